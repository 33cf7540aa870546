"""Inputs that leave a layer while the layer in front of it keeps its outputs: pruning behind a residual stream.

The channels of a residual stream belong to every block that adds to it, so none of them can leave for one block's
sake. A block can still read fewer of them: a :class:`ChannelSelection` in front of its first layer passes on those
that stay, and that layer loses the others' inputs.

Source: the block inputs of arXiv 2005.02634, after Liu et al., *Network Slimming*, arXiv 1708.06519.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dscore_plugin.errors import ModelError, PlanError
from dscore_plugin.groups import ChannelGroup, Member, Role
from dscore_plugin.modes import in_eval_mode
from dscore_plugin.plan import InputRemoval
from dscore_plugin.rollback import rolled_back_on_error
from dscore_plugin.sharing import shared_parameters

Reader = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


class ChannelSelection(nn.Module):
    """Pass on the selected channels of dim 1, in order; all of them while nothing is selected.

    The selection is a buffer outside of the state dict, so that weights saved before and after this module was put
    into a network load strictly into each other; an artifact stores it.

    Attributes:
        selected: the channels that pass, int64, shape ``(k,)``; empty means all.
    """

    selected: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("selected", torch.zeros(0, dtype=torch.int64), persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """Leave the selection as it is: nothing can compute it again (timm's protocol for loading)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, ...)`` to ``(B, k, ...)``."""
        return x.index_select(1, self.selected) if len(self.selected) else x

    def extra_repr(self) -> str:
        """Say how many channels pass."""
        return f"{len(self.selected) or 'all'} channels"


def input_groups(model: nn.Module, example_inputs: tuple[Any, ...]) -> tuple[ChannelGroup, ...]:
    """Find the inputs that can leave: one group for each selection that does not select yet.

    Args:
        model: a network, left as it is.
        example_inputs: the arguments of one forward pass.

    Returns:
        Groups named after the selections; their members are the layers that read what the selection passes on.

    Raises:
        ModelError: if the network does not run, or something else than a convolution without groups or a linear
            layer, with a weight of its own, reads a selection's output.
    """
    if not any(isinstance(module, ChannelSelection) for module in model.modules()):
        return ()
    groups = []
    for name, readers in _readers(model, example_inputs).items():
        if not len(model.get_submodule(name).selected):  # type: ignore[arg-type]
            channels = _width(model, readers[0])
            members = (Member(reader, Role.CONSUMER, *_all_of(channels), channels) for reader in readers)
            groups.append(ChannelGroup(name, channels, 1, tuple(members)))
    return tuple(groups)


def remove_inputs(
    model: nn.Module, example_inputs: tuple[Any, ...], removals: Sequence[InputRemoval]
) -> nn.Module:
    """Let selections pass on fewer channels, and take the others' inputs out of the layers behind them, in place.

    Args:
        model: a network with :class:`ChannelSelection` modules.
        example_inputs: the arguments of one forward pass.
        removals: which channels leave behind which selection.

    Returns:
        ``model``, in eval mode.

    Raises:
        PlanError: if a removal does not fit the network.
        ModelError: if the network does not run afterwards; then it is as it was.
    """
    groups = {group.name: group for group in input_groups(model, example_inputs)}
    _check(groups, removals)
    with rolled_back_on_error(model):
        for removal in removals:
            if removal.channels:
                _remove(model, groups[removal.layer], removal.channels)
        model.eval()
        _run(model, example_inputs)
    return model


def _check(groups: dict[str, ChannelGroup], removals: Sequence[InputRemoval]) -> None:
    for removal in removals:
        group = groups.get(removal.layer)
        if group is None:
            known = ", ".join(groups) or "none"
            raise PlanError(
                f"{removal.layer!r} is no channel selection that selects nothing yet; there are: {known}"
            )
        if removal.channels and not 0 <= min(removal.channels) <= max(removal.channels) < group.channels:
            raise PlanError(
                f"{removal.layer!r} has channels 0..{group.channels - 1}; got {max(removal.channels)}"
            )
        if len(set(removal.channels)) >= group.channels:
            raise PlanError(
                f"the plan removes all {group.channels} channels behind {removal.layer!r}; keep one"
            )


def _remove(model: nn.Module, group: ChannelGroup, channels: Sequence[int]) -> None:
    gone = set(channels)
    kept = torch.tensor([c for c in range(group.channels) if c not in gone], dtype=torch.int64)
    selection = model.get_submodule(group.name)
    assert isinstance(selection, ChannelSelection)
    selection.selected = kept.to(selection.selected.device)
    for member in group.members:
        reader = model.get_submodule(member.module)
        assert isinstance(reader, Reader)
        weight = reader.weight.detach().index_select(1, kept.to(reader.weight.device))
        reader.weight = nn.Parameter(weight, requires_grad=reader.weight.requires_grad)
        if isinstance(reader, nn.Linear):
            reader.in_features = len(kept)
        else:
            reader.in_channels = len(kept)


def _readers(model: nn.Module, example_inputs: tuple[Any, ...]) -> dict[str, list[str]]:
    """Name the layers that read each selection's output, in the order of the forward pass."""
    passed: dict[int, str] = {}
    alive: list[Tensor] = []  # so that no two outputs have the same id
    readers: dict[str, list[str]] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
            alive.append(output.view_as(output))  # a selection of everything gives its very input
            passed[id(alive[-1])] = name
            readers.setdefault(name, [])
            return alive[-1]

        return hook

    def read(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            source = passed.get(id(inputs[0])) if inputs else None
            if source is not None:
                readers[source].append(name)

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, ChannelSelection):
                stack.callback(module.register_forward_hook(note(name)).remove)
            elif not any(True for _ in module.children()):
                stack.callback(module.register_forward_pre_hook(read(name)).remove)
        with in_eval_mode(model):
            _run(model, example_inputs)
    for name, found in readers.items():
        _check_readers(model, name, found)
    return readers


def _check_readers(model: nn.Module, name: str, readers: Sequence[str]) -> None:
    modules = [model.get_submodule(reader) for reader in readers]
    fits = all(isinstance(module, Reader) and getattr(module, "groups", 1) == 1 for module in modules)
    if not modules or not fits:
        raise ModelError(
            f"behind the channel selection {name!r} stands {', '.join(readers) or 'no layer'}; expected convolutions "
            "without groups, or linear layers"
        )
    shared = shared_parameters(model)
    tied = next((weight for reader in readers if (weight := f"{reader}.weight") in shared), None)
    if tied is not None:
        raise ModelError(
            f"{tied!r} behind the channel selection {name!r} is {shared[tied]!r}, too; expected a weight of its own"
        )


def _width(model: nn.Module, reader: str) -> int:
    weight = model.get_submodule(reader).weight
    assert isinstance(weight, Tensor)
    return weight.shape[1]


def _all_of(channels: int) -> tuple[Tensor, Tensor]:
    return torch.arange(channels), torch.arange(channels)


def _run(model: nn.Module, example_inputs: tuple[Any, ...]) -> None:
    try:
        with torch.no_grad():
            model(*example_inputs)
    except Exception as error:
        raise ModelError(f"{type(model).__name__} does not run: {error}") from error
