"""Channels that removed kernels have left dead: nobody reads them, or nothing but a constant reaches them.

An input channel whose kernels are gone in every layer that reads it is *unread*. A filter whose kernels are all gone
gives a *constant*: its bias, moved by the norm and the activation behind it. What the constant adds to the next layer
is folded into that layer's bias, or into the batch norm behind it, where the sum is the same at every pixel: without
zero padding, or where the constant is zero. Then the channel is unread, too, and DepGraph can remove it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dscore_plugin.arguments import as_arguments
from dscore_plugin.errors import ModelError
from dscore_plugin.groups import ChannelGroup, Member, Role
from dscore_plugin.modes import in_eval_mode
from dscore_plugin.plan import ChannelRemoval, LayerRow, Plan, fingerprint
from dscore_plugin.rollback import rolled_back_on_error
from dscore_plugin.surgery.kernel_masks import KernelMasked, prune_kernels

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TOLERANCE = 1e-4
_FLAT = 1e-6  # of the largest magnitude: what still counts as constant


def remove_dead_channels(
    model: nn.Module, example_inputs: Tensor | tuple[Any, ...], groups: Sequence[ChannelGroup]
) -> Plan:
    """Remove dead channels physically, in place; the outputs stay as they are.

    Constants that cannot be folded keep their channels. A group keeps one channel at least.

    Args:
        model: a network that has lost kernels, or has zeros in their place.
        example_inputs: the arguments of one forward pass (a tensor stands for one argument).
        groups: the channel groups that may be pruned, of this network.

    Returns:
        The plan that was carried out: which channels left. Its fingerprint is that of the network with the constants
        folded; MACs and parameters are not counted.

    Raises:
        ModelError: if the outputs would change by more than 1e-4 of the largest; the network is then as it was.
    """
    arguments = as_arguments(example_inputs)
    with rolled_back_on_error(model):
        plan = _fold_and_plan(model, arguments, groups)
        inputs = _random_inputs(arguments)
        before = _run(model, inputs)
        plan.apply(model, arguments)
        _require_equal(before, _run(model, inputs))
    return plan


@torch.no_grad()
def _fold_and_plan(model: nn.Module, example_inputs: tuple[Any, ...], groups: Sequence[ChannelGroup]) -> Plan:
    inputs = _random_inputs(example_inputs)
    before = _run(model, inputs)
    usable = [group for group in groups if not group.protected and not _mixes_channels(model, group)]
    found: dict[str, Tensor] = {}
    while True:  # every removal may leave others dead, in front of it and behind it
        changed = False
        behind = _norms_behind(model, inputs)
        for group in usable:
            unread = _unread(model, group)
            constant = _constant(model, group, ~unread)
            seen = _watch(model, group, inputs) if constant else {}
            for unit in constant:
                unread[unit] = _fold(model, group, unit, seen, behind)
            newly = unread & ~found.get(group.name, torch.zeros_like(unread))
            if newly.any():
                changed = True
                found[group.name] = unread
                _silence_producers(model, group, unread)
        if not changed:
            break
    _require_equal(before, _run(model, inputs))
    image = next((x for x in example_inputs if isinstance(x, Tensor)), torch.empty(0))
    removals, rows = [], []
    for group in usable:
        units = found.get(group.name, torch.zeros(group.units, dtype=torch.bool)).nonzero().flatten().tolist()
        units = units[1:] if len(units) == group.units else units
        rows.append(LayerRow(group.name, group.channels, None, None, None, 0))
        if units:
            removals.append(ChannelRemoval(group.name, group.root_channels(units)))
    return Plan(
        fingerprint(model),
        tuple(image.shape[1:]),
        tuple(removals),
        tuple(rows),
        made_by={"criterion": "dead_channels"},
    )


def _mixes_channels(model: nn.Module, group: ChannelGroup) -> bool:
    """Whether the channels of a group touch one another in a norm, or reach something that cannot be looked into."""
    norms = [model.get_submodule(member.module) for member in group.roles(Role.NORM)]
    readers = [model.get_submodule(member.module) for member in group.roles(Role.CONSUMER)]
    per_channel = all(isinstance(norm, _BatchNorm | nn.PReLU) for norm in norms)
    return not per_channel or not all(isinstance(reader, (*_CONVOLUTIONS, nn.Linear)) for reader in readers)


def _unread(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Return which units no layer reads: bool, shape ``(units,)``."""
    unread = torch.ones(group.units, dtype=torch.bool)
    for member in group.roles(Role.CONSUMER):
        read = _reads(model.get_submodule(member.module))
        unread[member.unit[read[member.index]]] = False
    return unread


def _reads(module: Any) -> Tensor:
    """Return which input channels of a layer have a weight: bool, shape ``(in,)``."""
    live: Tensor = module.weight.detach().cpu().ne(0)
    if isinstance(module, nn.Linear):
        return live.any(dim=0)
    by_group = live.flatten(2).any(dim=2).view(module.groups, -1, live.shape[1])
    return by_group.any(dim=1).flatten()


def _constant(model: nn.Module, group: ChannelGroup, wanted: Tensor) -> list[int]:
    """Return the units, of those wanted, all of whose filters have no weight."""
    dead = wanted.clone()
    for member in group.roles(Role.PRODUCER):
        module: Any = model.get_submodule(member.module)
        if not isinstance(module, (*_CONVOLUTIONS, nn.Linear)):
            return []
        live = module.weight.detach().cpu().ne(0).flatten(1).any(dim=1)
        dead[member.unit[live[member.index]]] = False
    return dead.nonzero().flatten().tolist()


@dataclass(frozen=True)
class _Seen:
    """What a layer got in one forward pass: per input channel the mean, and whether it was the same everywhere."""

    mean: Tensor
    flat: Tensor


def _watch(model: nn.Module, group: ChannelGroup, inputs: tuple[Any, ...]) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            rows = x.flatten(0, -2).T if isinstance(module, nn.Linear) else x.transpose(0, 1).flatten(1)
            spread = rows.amax(dim=1) - rows.amin(dim=1)
            flat = spread <= _FLAT * rows.abs().max().clamp(min=1e-30)
            now = _Seen(rows.double().mean(dim=1).cpu(), flat.cpu() & (name not in seen))  # called once only
            seen[name] = now

        return hook

    with ExitStack() as stack:
        for member in group.roles(Role.CONSUMER):
            module = model.get_submodule(member.module)
            stack.callback(module.register_forward_pre_hook(keep(member.module)).remove)
        _run(model, inputs)
    return seen


def _norms_behind(model: nn.Module, inputs: tuple[Any, ...]) -> dict[nn.Module, _BatchNorm]:
    """Find for each convolution the batch norm that reads its very output."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    found: dict[nn.Module, _BatchNorm] = {}

    def make(module: nn.Module, _: Any, output: Tensor) -> None:
        made[id(output)] = (module, output)

    def read(module: _BatchNorm, args: tuple[Any, ...]) -> None:
        if id(args[0]) in made:
            found[made[id(args[0])][0]] = module

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, _CONVOLUTIONS):
                stack.callback(module.register_forward_hook(make).remove)
            elif isinstance(module, _BatchNorm) and module.running_mean is not None:
                stack.callback(module.register_forward_pre_hook(read).remove)
        _run(model, inputs)
    return found


def _fold(
    model: nn.Module,
    group: ChannelGroup,
    unit: int,
    seen: dict[str, _Seen],
    behind: dict[nn.Module, _BatchNorm],
) -> bool:
    """Move what a constant unit adds to its readers into them, if all of them allow it."""
    readers = [(member, member.positions(torch.tensor([unit]))) for member in group.roles(Role.CONSUMER)]
    modules = [model.get_submodule(member.module) for member, _ in readers]
    values = []
    for (member, positions), module in zip(readers, modules, strict=True):
        now = seen.get(member.module)
        if now is None or not bool(now.flat[positions].all()):
            return False
        values.append(now.mean[positions])
        if bool(values[-1].ne(0).any()) and not _takes_constants(module, behind):
            return False
    for (member, positions), module, value in zip(readers, modules, values, strict=True):
        _add_constant(module, _contribution(module, positions, value), behind)
        _forget_inputs(model, member, positions)
    return True


def _takes_constants(module: Any, behind: dict[nn.Module, _BatchNorm]) -> bool:
    if isinstance(module, nn.Linear):
        return module.bias is not None
    padded = isinstance(module.padding, str) or any(module.padding)
    return not padded and (module.bias is not None or module in behind)


def _contribution(module: Any, positions: Tensor, values: Tensor) -> Tensor:
    """Return what constant inputs add to each output: float64, shape ``(out,)``."""
    weight = module.weight.detach().cpu().double()
    if isinstance(module, nn.Linear):
        return weight[:, positions] @ values
    per_group, outputs = weight.shape[1], len(weight) // module.groups
    added = torch.zeros(len(weight), dtype=torch.float64)
    for position, value in zip(positions.tolist(), values, strict=True):
        rows = slice(position // per_group * outputs, (position // per_group + 1) * outputs)
        added[rows] += value * weight[rows, position % per_group].flatten(1).sum(dim=1)
    return added


def _add_constant(module: Any, added: Tensor, behind: dict[nn.Module, _BatchNorm]) -> None:
    if not bool(added.ne(0).any()):
        return
    if module.bias is not None:
        bias = module.bias.detach()
        module.bias = nn.Parameter(bias + added.to(bias), module.bias.requires_grad)
    else:
        norm = behind[module]
        assert norm.running_mean is not None
        norm.running_mean = norm.running_mean - added.to(norm.running_mean)


def _forget_inputs(model: nn.Module, member: Member, positions: Tensor) -> None:
    """Write zeros where a layer reads these inputs."""
    module: Any = model.get_submodule(member.module)
    keep = torch.ones(member.width, dtype=torch.bool)
    keep[positions] = False
    if not isinstance(module, nn.Linear):
        per_group = module.weight.shape[1]
        keep = keep.view(module.groups, per_group).repeat_interleave(
            len(module.weight) // module.groups, dim=0
        )
    _mask(model, member.module, keep.expand(module.weight.shape[:2]))


def _silence_producers(model: nn.Module, group: ChannelGroup, unread: Tensor) -> None:
    """Write zeros into the filters whose channels nobody reads, so that what they read may be found unread, too."""
    for member in group.roles(Role.PRODUCER):
        module: Any = model.get_submodule(member.module)
        if isinstance(module, (*_CONVOLUTIONS, nn.Linear)):
            keep = torch.ones(len(module.weight), dtype=torch.bool)
            keep[member.index[unread[member.unit]]] = False
            _mask(model, member.module, keep.view(-1, 1).expand(module.weight.shape[:2]))


def _mask(model: nn.Module, name: str, keep: Tensor) -> None:
    module: Any = model.get_submodule(name)
    if isinstance(module, KernelMasked):
        prune_kernels(model, {name: keep.contiguous()})
        return
    weight = module.weight
    shaped = keep.view(*keep.shape, *[1] * (weight.ndim - 2)).to(weight.device)
    module.weight = nn.Parameter(weight.detach() * shaped, weight.requires_grad)


def _random_inputs(example_inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn((2, *x.shape[1:]), generator=generator).to(x)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in example_inputs
    )


@torch.no_grad()
def _run(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    with in_eval_mode(model):
        output = model(*inputs)
    if not isinstance(output, Tensor):
        raise ModelError(f"expected a network that returns one tensor, got {type(output).__name__}")
    return output


def _require_equal(before: Tensor, after: Tensor) -> None:
    change, largest = float((after - before).abs().max()), float(before.abs().max())
    if not change <= _TOLERANCE * max(largest, 1e-6):
        raise ModelError(
            f"the removal of dead channels would change the outputs by {change:.2g} (largest: {largest:.2g}); keep them"
        )
