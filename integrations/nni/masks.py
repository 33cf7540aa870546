"""What NNI's masks take from a layer, and which units of a channel group they silence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dscore_plugin.groups import ChannelGroup, Member, Role


@dataclass(frozen=True)
class LayerMask:
    """What a mask of its weight takes from a layer, whatever way round the layer keeps the weight.

    Attributes:
        kernels: the kernels that are taken whole, bool, shape ``(out, in / groups)``.
        outputs: the outputs without kernels, bool, shape ``(out,)``.
        inputs: the inputs that no kernel reads, bool, shape ``(in,)``; none where no output is left.
        finer: whether it takes parts of kernels, too.
    """

    kernels: Tensor
    outputs: Tensor
    inputs: Tensor
    finer: bool

    @staticmethod
    def of(module: nn.Module, mask: Tensor) -> LayerMask:
        """Read a mask.

        Args:
            module: a convolution, transposed or not, or a linear layer.
            mask: 1 keeps and 0 takes; of the weight's shape, or broadcastable to it.
        """
        weight: Tensor = module.weight  # type: ignore[assignment]
        taken = (mask.detach().cpu().expand(weight.shape) == 0).reshape(*weight.shape[:2], -1)
        kernels, parts = taken.all(dim=2), getattr(module, "groups", 1)
        finer = bool(torch.any(taken.any(dim=2) & ~kernels))
        if isinstance(module, _ConvNd) and module.transposed:  # the weight is (in, out / groups, ...)
            turned = kernels.view(parts, -1, kernels.shape[1]).transpose(1, 2)
            kernels = turned.reshape(module.out_channels, -1)
        inputs, outputs = kernels.view(parts, -1, kernels.shape[1]).all(dim=1).flatten(), kernels.all(dim=1)
        return LayerMask(kernels, outputs, inputs & ~outputs.all(), finer)


FindMask = Callable[[str], "LayerMask | None"]


@dataclass(frozen=True)
class Silence:
    """What masks do to the units of a group.

    Attributes:
        units: silenced whole, bool, shape ``(units,)``: every layer that produces them is masked there, or no layer
            that reads them does so any more. None where that holds for all of them: they cannot leave, and so the
            masks are not carried on either.
        everything: whether it holds for all of them.
        touched: masked in some layer at least, bool, shape ``(units,)``.
        split: masked at some of their positions in a layer and not at others, bool, shape ``(units,)``.
    """

    units: Tensor
    everything: bool
    touched: Tensor
    split: Tensor


def silence(group: ChannelGroup, find: FindMask) -> Silence:
    """Say which units of a group are silenced by masks; ``find`` gives the mask of a layer, None without one."""
    makers = group.roles(Role.PRODUCER) or group.roles(Role.DEPTHWISE)
    made = [_gone(group, member, find(member.module)) for member in makers]
    read = [_gone(group, member, find(member.module)) for member in group.roles(Role.CONSUMER)]
    others = [_gone(group, member, find(member.module)) for member in group.roles(Role.DEPTHWISE)]
    nothing = torch.zeros(group.units, dtype=torch.bool)
    whole = [torch.stack([units for units, _ in side]).all(dim=0) for side in (made, read) if side]
    touched = torch.stack([nothing, *(part for _, part in (*made, *read, *others))]).any(dim=0)
    split = torch.stack([nothing, *(part & ~units for units, part in (*made, *read, *others))]).any(dim=0)
    units = torch.stack([nothing, *whole]).any(dim=0) & touched
    everything = bool(units.all())
    return Silence(nothing if everything else units, everything, touched, split)


def _gone(group: ChannelGroup, member: Member, mask: LayerMask | None) -> tuple[Tensor, Tensor]:
    """Return the units with no unmasked position in a member, and those with a masked one."""
    whole = torch.ones(group.units, dtype=torch.bool)
    part = torch.zeros(group.units, dtype=torch.bool)
    masked = torch.zeros(member.width, dtype=torch.bool)
    if mask is not None:
        masked = mask.inputs if member.role is Role.CONSUMER else mask.outputs
    at = masked[member.index]
    whole[member.unit[~at]] = False
    part[member.unit[at]] = True
    return whole, part
