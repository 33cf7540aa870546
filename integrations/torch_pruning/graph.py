"""DepGraph to ChannelGroups: the one walker over Torch-Pruning's groups."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch_pruning import ops
from torch_pruning.dependency import DependencyGraph, Group, shape_infer
from torch_pruning.pruner import function

from dscore_plugin.costs import Cost, CostTable
from dscore_plugin.errors import ModelError
from dscore_plugin.groups import ChannelGroup, Member, Role, ScoredGroup
from dscore_plugin.integrations.torch_pruning.counting import CallRecorder, count

_NORMS = {ops.OPTYPE.BN, ops.OPTYPE.LN, ops.OPTYPE.GN, ops.OPTYPE.IN, ops.OPTYPE.PRELU}
_LAYERS = {ops.OPTYPE.CONV, ops.OPTYPE.LINEAR, ops.OPTYPE.EMBED, ops.OPTYPE.MHA, ops.OPTYPE.LSTM}


@dataclass(frozen=True)
class Producer:
    """One layer whose filters make some of a group's channels, as Torch-Pruning's group lists it.

    Attributes:
        module: the layer.
        filters: its filters, along dim 0; all of them, pruned or not.
        index: the filters that belong to the group, shape ``(k,)``; None means all, in order.
        root: the position in the group's score of each of these, shape ``(k,)``; None means ``0..k-1``.
    """

    module: nn.Module
    filters: Tensor
    index: Tensor | None
    root: Tensor | None


def producers(group: Group) -> Iterator[Producer]:
    """Walk the layers that produce a group's channels: convolutions of every kind and linear layers.

    Args:
        group: a group of DepGraph's; it may list only some of the root's channels.

    Yields:
        The producers in the group's order. Positions count within the group's own list of root channels.
    """
    first = group[0].idxs
    whole = list(range(len(first)))
    place = None if first == whole else {channel: position for position, channel in enumerate(first)}
    for item in group:
        filters = _filters(item.dep.target.module, item.dep.handler)
        if filters is None:
            continue
        index = None if item.idxs == whole and len(whole) == len(filters) else torch.as_tensor(item.idxs)
        if item.root_idxs == whole and place is None:
            yield Producer(item.dep.target.module, filters, index, None)
            continue
        roots = item.root_idxs if place is None else [place.get(channel) for channel in item.root_idxs]
        if any(root is None for root in roots):
            continue  # DepGraph lost track of the channels (grouped-query attention)
        yield Producer(item.dep.target.module, filters, index, torch.as_tensor(roots))


def _filters(module: Any, handler: Any) -> Tensor | None:
    if handler in (function.prune_conv_out_channels, function.prune_depthwise_conv_out_channels):
        weight = module.weight.detach()
        if not module.transposed or module.groups == module.out_channels:
            return weight
        return weight.transpose(0, 1)
    if handler == function.prune_linear_out_channels:
        return module.weight.detach()
    return None


class PruningGraph:
    """A traced network: its channel groups, and what each of their units costs.

    Tracing leaves the network as it was: modes, ``requires_grad`` and hooks are restored.

    Args:
        model: the network; frozen parameters and training mode are fine, parametrised weights are not.
        example_inputs: the arguments of one forward pass, with a batch dimension.
        ignored: modules whose channels must stay; a container stands for everything in it.

    Attributes:
        groups: every group that DepGraph finds, in the order of the network; those that cannot be pruned
            say why in ``protected``.

    Raises:
        ModelError: if a weight is parametrised or the network cannot be traced.
    """

    def __init__(
        self, model: nn.Module, example_inputs: tuple[Any, ...], ignored: Sequence[nn.Module] = ()
    ) -> None:
        self.model = model
        self.example_inputs = example_inputs
        self._ignored = {inner for module in ignored for inner in module.modules()}
        _refuse_parametrised(model)
        recorder = CallRecorder()
        with _traceable(model), recorder.watch(model):
            self.depgraph = _build(model, example_inputs)
        self._terms = list(recorder.terms.values())
        self._outputs = set(recorder.outputs)
        self._calls = {grad_fn: (name, call) for name, call, grad_fn in recorder.passing}
        self._names = {module: name for name, module in model.named_modules()}
        self.depgroups: dict[str, Group] = {}
        self.groups = tuple(self._walk())

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        """The groups that may be pruned."""
        return tuple(group for group in self.groups if not group.protected)

    @cached_property
    def costs(self) -> CostTable:
        """The table of MACs and parameters; it agrees with Torch-Pruning's counter on the dense network."""
        total = Cost(*count(self.model, self.example_inputs))
        counted = sum((term.total for term in self._terms), Cost())
        return CostTable(self._terms, self.groups, fixed=total - counted)

    def score(self, group: ChannelGroup, importance: Callable[[Group], Tensor | None]) -> ScoredGroup | None:
        """Score one of the groups with an importance object; the channels of a unit are averaged.

        Returns:
            The group with its scores, or None if the importance finds nothing to score in it.
        """
        scores = importance(self.depgroups[group.name])
        if scores is None or len(scores) == 0:
            return None
        return ScoredGroup(
            group, scores.detach().to("cpu", torch.float64).view(group.division, -1).mean(dim=0)
        )

    def _walk(self) -> Iterator[ChannelGroup]:
        for depgroup in self.depgraph.get_all_groups():
            group = self._group(depgroup)
            self.depgroups[group.name] = depgroup
            yield group

    def _group(self, depgroup: Group) -> ChannelGroup:
        root = self._names[depgroup[0].dep.target.module]
        channels = len(depgroup[0].idxs)
        division = math.lcm(1, *(_division(item.dep.target.module, item.dep.handler) for item in depgroup))
        if channels % division:
            reason = f"{channels} channels do not divide into the {division} groups of a grouped layer"
            return ChannelGroup(root, channels, 1, (), protected=reason)
        members = tuple(self._members(depgroup, channels // division))
        group = ChannelGroup(root, channels, division, members)
        return replace(group, protected=self._protection(depgroup, group))

    def _members(self, depgroup: Group, units: int) -> Iterator[Member]:
        for item in depgroup:
            node = item.dep.target
            if any(root is None for root in item.root_idxs):
                continue
            index, unit = torch.as_tensor(item.idxs), torch.as_tensor(item.root_idxs) % units
            role = self._role(node, item.dep.handler)
            if role is not None:
                name, width = self._identity(node, role)
                yield Member(name, role, index, unit, width)
            if node.grad_fn in self._calls:  # an activation, alone or inside timm's norm-and-activation
                name, call = self._calls[node.grad_fn]
                width = shape_infer.infer_out_channels_recursively(self.depgraph, node, [0]) or len(index)
                yield Member(name, Role.PASSING, index, unit, width, call)

    def _identity(self, node: Any, role: Role) -> tuple[str, int]:
        """Return the qualified name of a layer or bare parameter, and the size of its channel dimension."""
        if role is Role.PARAMETER:
            return self.depgraph._param_to_name[node.module], node.module.shape[node.pruning_dim]
        is_in = role is Role.CONSUMER
        width = (self.depgraph.get_in_channels if is_in else self.depgraph.get_out_channels)(node)
        return self._names[node.module], int(width or 1)

    def _role(self, node: Any, handler: Any) -> Role | None:
        """Say what a node loses; None if it has nothing of its own."""
        if node.type == ops.OPTYPE.DEPTHWISE_CONV:
            return Role.DEPTHWISE
        if node.type in _NORMS:
            return Role.NORM
        if node.type == ops.OPTYPE.PARAMETER:
            return Role.PARAMETER
        if node.type in _LAYERS:
            return Role.PRODUCER if self.depgraph.is_out_channel_pruning_fn(handler) else Role.CONSUMER
        return None

    def _protection(self, depgroup: Group, group: ChannelGroup) -> str:
        """Say why a group must stay, or return an empty string."""
        nodes = [item.dep.target for item in depgroup]
        modules = [node.module for node in nodes]
        outs = [m.module for m in group.roles(Role.PRODUCER, Role.DEPTHWISE)]
        ignored = next((name for name in outs if self.model.get_submodule(name) in self._ignored), None)
        if ignored is not None:
            return f"{ignored!r} is ignored"
        if any(node.type == ops.OPTYPE.OUTPUT or node.grad_fn in self._outputs for node in nodes):
            return "its channels are an output of the network"
        if not group.roles(Role.CONSUMER):
            return "no layer consumes its channels"
        if any(self._pads_channels(node) for node in nodes):
            return "its channels pass through a padding of channels, which DepGraph cannot map"
        if any(_is_unprunable_transposed(module) for module in modules):
            return "DepGraph cannot prune a grouped transposed convolution"
        uneven = next((m.module for m in group.members if not self._is_even(m)), None)
        if uneven is not None:
            return f"its channels reach the groups of {uneven!r} in unequal positions"
        return "it has a single unit" if group.units < 2 else ""

    def _pads_channels(self, node: Any) -> bool:
        pad = getattr(node.grad_fn, "_saved_pad", ())
        if not any(pad[4:]):
            return False
        before = shape_infer.infer_out_channels_recursively(self.depgraph, node, [0])
        after = [shape_infer.infer_in_channels_recursively(self.depgraph, out, [0]) for out in node.outputs]
        return any(width is not None and width != before for width in after)

    def _is_even(self, member: Member) -> bool:
        """Whether every unit takes the same positions out of every group of a grouped layer."""
        if member.role in (Role.PASSING, Role.PARAMETER, Role.DEPTHWISE):
            return True
        module = self.model.get_submodule(member.module)
        parts = getattr(module, "groups", 1) if isinstance(module, ops.TORCH_CONV) else 1
        parts = module.num_groups if isinstance(module, nn.GroupNorm) else parts
        if parts == 1:
            return True
        pairs = torch.stack([member.unit, member.index % (member.width // parts)])
        return bool((torch.unique(pairs, dim=1, return_counts=True)[1] == parts).all())


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Unfreeze everything and switch to eval mode for tracing; restore both.

    DepGraph follows autograd: a frozen parameter vanishes from its graph.
    """
    modes = {module: module.training for module in model.modules()}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, mode in modes.items():
            module.training = mode


def _build(model: nn.Module, example_inputs: tuple[Any, ...]) -> DependencyGraph:
    try:
        return DependencyGraph().build_dependency(model, example_inputs, verbose=False)
    except Exception as error:
        shapes = [tuple(x.shape) for x in example_inputs if isinstance(x, Tensor)]
        raise ModelError(
            f"{type(model).__name__} cannot be traced with inputs of shape {shapes}: {error}; "
            "check the input shape, and that forward() runs on it"
        ) from error


def _refuse_parametrised(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ModelError(
                f"{name!r} has a parametrised weight, which cannot be removed from; call "
                "torch.nn.utils.parametrize.remove_parametrizations on it first"
            )


def _division(module: Any, handler: Any) -> int:
    """How many channels leave together because of a grouped convolution or a group norm."""
    if isinstance(module, nn.GroupNorm):
        return int(module.num_groups)
    if isinstance(module, ops.TORCH_CONV) and handler != function.prune_depthwise_conv_out_channels:
        return int(module.groups)
    return 1


def _is_unprunable_transposed(module: Any) -> bool:
    return (
        isinstance(module, ops.TORCH_CONV)
        and module.transposed
        and module.groups > 1
        and not module.groups == module.out_channels == module.in_channels
    )
