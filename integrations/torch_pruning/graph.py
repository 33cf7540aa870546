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
from torch_pruning._helpers import GroupItem
from torch_pruning.dependency import DependencyGraph, Group, index_mapping, shape_infer
from torch_pruning.pruner import function

from dscore_plugin.costs import Cost, CostTable, CostTerm
from dscore_plugin.errors import CriterionError, ModelError
from dscore_plugin.groups import ChannelGroup, Member, Role, ScoredGroup
from dscore_plugin.integrations.torch_pruning.counting import CallRecorder, count, shares_one_weight
from dscore_plugin.surgery.inputs import input_groups

_NORMS = {ops.OPTYPE.BN, ops.OPTYPE.LN, ops.OPTYPE.GN, ops.OPTYPE.IN, ops.OPTYPE.PRELU}
_LAYERS = {ops.OPTYPE.CONV, ops.OPTYPE.LINEAR, ops.OPTYPE.EMBED, ops.OPTYPE.MHA, ops.OPTYPE.LSTM}
_SPLITS = (index_mapping._SplitIndexMapping, index_mapping._SliceIndexMapping)


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
        return _of_transposed(weight, module.groups) if module.transposed else weight
    if handler == function.prune_linear_out_channels:
        return module.weight.detach()
    return None


def _of_transposed(weight: Tensor, groups: int) -> Tensor:
    """Put the filters of a transposed convolution, ``(in, out / groups, ...)``, along dim 0."""
    parts = weight.view(groups, len(weight) // groups, *weight.shape[1:])
    return parts.transpose(1, 2).flatten(0, 1)


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
    def inputs(self) -> tuple[ChannelGroup, ...]:
        """The inputs that can leave behind channel selections; DepGraph knows nothing of them."""
        return input_groups(self.model, self.example_inputs)

    @cached_property
    def costs(self) -> CostTable:
        """The table of MACs and parameters; it agrees with Torch-Pruning's counter on the dense network."""
        total = Cost(*count(self.model, self.example_inputs))
        bare = {member.module for group in self.groups for member in group.roles(Role.PARAMETER)}
        sizes = {name: self.model.get_parameter(name).numel() for name in sorted(bare)}
        terms = [*self._terms, *(CostTerm(name, 0, Cost(), Cost(0, size)) for name, size in sizes.items())]
        counted = sum((term.total for term in terms), Cost())
        return CostTable(terms, (*self.groups, *self.inputs), fixed=total - counted)

    def score(self, group: ChannelGroup, importance: Callable[[Group], Tensor | None]) -> ScoredGroup | None:
        """Score one of the groups with an importance object; the channels of a unit are averaged.

        Returns:
            The group with its scores, or None if the importance finds nothing to score in it.

        Raises:
            CriterionError: if the importance gives more or fewer scores than the group has channels.
        """
        scores = importance(self.depgroups[group.name])
        if scores is None or len(scores) == 0:
            return None
        if scores.shape != (group.channels,):
            raise CriterionError(
                f"expected one score for each of the {group.channels} channels of {group.name!r}, got a tensor of "
                f"shape {tuple(scores.shape)} from {type(importance).__name__}"
            )
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
            # an activation, alone or inside timm's norm-and-activation, or a norm without weights
            counted, call = self._calls.get(node.grad_fn, ("", 0))
            if role is not None:
                name, width = self._identity(node, role)
                yield Member(name, role, index, unit, width, call if counted == name else 0)
                counted = "" if counted == name else counted
            if counted:
                width = shape_infer.infer_out_channels_recursively(self.depgraph, node, [0]) or 0
                yield Member(counted, Role.PASSING, index, unit, max(width, int(index.max()) + 1), call)

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
            return None if shares_one_weight(node.module) else Role.NORM
        if node.type == ops.OPTYPE.PARAMETER:
            return Role.PARAMETER
        if node.type in _LAYERS:
            return Role.PRODUCER if self.depgraph.is_out_channel_pruning_fn(handler) else Role.CONSUMER
        return None

    def _protection(self, depgroup: Group, group: ChannelGroup) -> str:
        """Say why a group must stay, or return an empty string."""
        outs = group.roles(Role.PRODUCER, Role.DEPTHWISE, Role.NORM)
        ignored = next((m.module for m in outs if self.model.get_submodule(m.module) in self._ignored), None)
        if ignored is not None:
            return f"{ignored!r} is ignored"
        if any(self._is_output(item) for item in depgroup):
            return "its channels are an output of the network"
        if not group.roles(Role.CONSUMER):
            return "no layer consumes its channels"
        lost = next((reason for item in depgroup if (reason := self._lost_track(item))), "")
        if lost:
            return lost
        beyond = next((m.module for m in group.members if int(m.index.max()) >= m.width), None)
        if beyond is not None:
            return f"its channels reach {beyond!r} by a way that DepGraph cannot map"
        uneven = next((m.module for m in group.members if not self._is_even(m)), None)
        if uneven is not None:
            return f"its channels reach the groups of {uneven!r} in unequal positions"
        if self._ties_units(depgroup, group):
            return "a reshape or a concatenation ties some of its channels to one another"
        return "it has a single unit" if group.units < 2 else ""

    def _is_output(self, item: GroupItem) -> bool:
        node = item.dep.target
        emits = self.depgraph.is_out_channel_pruning_fn(item.dep.handler)  # and does not only consume
        return emits and (node.type == ops.OPTYPE.OUTPUT or node.grad_fn in self._outputs)

    def _lost_track(self, item: GroupItem) -> str:
        """Say why DepGraph cannot follow the channels through a node, or cannot prune it; empty if it can."""
        node = item.dep.target
        if any(root is None for root in item.root_idxs):
            return "DepGraph loses track of its channels (grouped-query attention)"
        if any(isinstance(mapping, _SPLITS) for mapping in item.dep.index_mapping):
            return "its channels are split, at places that pruning would move"
        if self._pads_channels(node):
            return "its channels pass through a padding of channels, which DepGraph cannot map"
        if self._misplaces_joined(node):
            return "its channels are joined with some of unknown origin, which DepGraph cannot map"
        if self._spreads_channels(node):
            return "its channels are spread over several dimensions (a shuffle, attention heads)"
        return _unprunable(node.module)

    def _pads_channels(self, node: Any) -> bool:
        pad = getattr(node.grad_fn, "_saved_pad", ())
        if not any(pad[4:]):
            return False
        before = shape_infer.infer_out_channels_recursively(self.depgraph, node, [0])
        after = [shape_infer.infer_in_channels_recursively(self.depgraph, out, [0]) for out in node.outputs]
        return any(width is not None and width != before for width in after)

    def _misplaces_joined(self, node: Any) -> bool:
        """Whether a concatenation of channels has inputs that DepGraph does not see (the image, constants)."""
        if node.type != ops.OPTYPE.CONCAT:
            return False
        dim, shape = node.grad_fn._saved_dim, node.grad_fn._input_metadata[0].shape
        dim = dim - 2**64 if dim >= 2**63 else dim  # torch shows negative dimensions as unsigned numbers
        width = shape_infer.infer_out_channels_recursively(self.depgraph, node.inputs[0], [0])
        joins_tokens = len(shape) == 3 and width == shape[2]
        if dim >= 0 and dim != (2 if joins_tokens else 1):
            return False
        return node.module.offsets is None or node.module.offsets[-1] != shape[dim]

    def _spreads_channels(self, node: Any) -> bool:
        """Whether a reshape begins at a tensor of four or more dimensions none of which holds the channels."""
        if node.type != ops.OPTYPE.RESHAPE:
            return False
        shape: Sequence[int] = getattr(node.grad_fn, "_saved_self_sym_sizes", ())
        width = shape_infer.infer_out_channels_recursively(self.depgraph, node, [0])
        return len(shape) >= 4 and width is not None and width not in (shape[1], shape[-1])

    def _ties_units(self, depgroup: Group, group: ChannelGroup) -> bool:
        """Whether removing some units takes others with them.

        Two units differ in some bit of their numbers: for each bit, DepGraph is asked what leaves with the units
        that have it set. Only a mapping against the direction of the data can tie them.
        """
        mappings = (mapping for item in depgroup for mapping in item.dep.index_mapping)
        if not any(getattr(mapping, "reverse", False) for mapping in mappings):
            return False
        root, prune_out = depgroup[0].dep.target.module, depgroup[0].dep.handler
        for bit in range((group.units - 1).bit_length()):
            channels = group.root_channels(u for u in range(group.units) if u >> bit & 1)
            leaving = self.depgraph.get_pruning_group(root, prune_out, list(channels))[0].idxs
            if len(leaving) > len(channels):
                return True
        return False

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
    """Unfreeze everything for tracing, and on exit restore that, the modes and the hooks.

    DepGraph follows autograd: a frozen parameter vanishes from its graph. It leaves the model in eval mode, and
    its hooks on the model if forward() raises.
    """
    modes = {module: module.training for module in model.modules()}
    hooks = {module: list(module._forward_hooks) for module in model.modules()}
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
        for module, known in hooks.items():
            for key in set(module._forward_hooks).difference(known):
                del module._forward_hooks[key]


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


def _unprunable(module: Any) -> str:
    """Say why DepGraph cannot prune a layer, or return an empty string."""
    if isinstance(module, ops.TORCH_CONV) and module.transposed and module.groups > 1:
        if not module.groups == module.out_channels == module.in_channels:
            return "DepGraph cannot prune a grouped transposed convolution"
    elif isinstance(module, ops.TORCH_INSTANCENORM) and module.running_mean is not None:
        return "DepGraph cannot prune the running statistics of an instance norm"
    elif isinstance(module, ops.TORCH_LAYERNORM) and len(module.normalized_shape) > 1:
        return "a layer norm over several dimensions does not say which of them are channels"
    elif isinstance(module, ops.TORCH_MHA | ops.TORCH_LSTM):
        return f"what leaves a {type(module).__name__} with its channels cannot be masked or counted"
    return ""
