"""Groups of channels that the loss of one layer can speak for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dscore_plugin.groups import ChannelGroup, Role
from dscore_plugin.modes import in_eval_mode


@dataclass(frozen=True)
class Candidate:
    """A group whose units can be chosen: one convolution reads them all, and nothing else.

    Attributes:
        group: the group.
        layer: qualified name of that convolution.
        units: the unit of each of its input channels, int64, shape ``(c,)``.
    """

    group: ChannelGroup
    layer: str
    units: Tensor


def candidates(
    model: nn.Module, example_inputs: tuple[Any, ...], groups: Sequence[ChannelGroup]
) -> tuple[Candidate, ...]:
    """Find the groups that can be chosen by the loss of one layer.

    These have one producer (residual streams stay whole), and all inputs of one convolution without groups, called
    once, are theirs: the second convolution of a basic block, the second and the third of a bottleneck, the
    projection behind a depthwise convolution, every convolution but the first of a plain network.

    Args:
        model: the network; it is left as it was.
        example_inputs: the arguments of one forward pass.
        groups: that may be pruned.
    """
    calls: Counter[str] = Counter()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, _ConvNd):
                hook = module.register_forward_pre_hook(lambda _, __, name=name: calls.update([name]))
                stack.callback(hook.remove)
        with torch.no_grad(), in_eval_mode(model):
            model(*example_inputs)
    found = (_candidate(model, group) for group in groups)
    return tuple(c for c in found if c is not None and calls[c.layer] == 1)


def _candidate(model: nn.Module, group: ChannelGroup) -> Candidate | None:
    consumers = group.roles(Role.CONSUMER)
    if not group.is_inner or len(consumers) != 1:
        return None
    (consumer,) = consumers
    layer = model.get_submodule(consumer.module)
    if not isinstance(layer, _ConvNd) or layer.transposed or layer.groups > 1:
        return None
    order = torch.argsort(consumer.index)
    if not torch.equal(consumer.index[order], torch.arange(consumer.width)):
        return None  # another group has the rest of its inputs
    return Candidate(group, consumer.module, consumer.unit[order])
