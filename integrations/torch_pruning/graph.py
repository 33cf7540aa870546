"""DepGraph to ChannelGroups: the one walker over Torch-Pruning's groups."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch_pruning import ops
from torch_pruning.dependency import Group
from torch_pruning.pruner import function

from dscore_plugin.arguments import as_arguments
from dscore_plugin.costs import Cost, CostTable, CostTerm
from dscore_plugin.errors import CriterionError, ModelError
from dscore_plugin.filters import filters_first
from dscore_plugin.groups import ChannelGroup, Member, Role, ScoredGroup
from dscore_plugin.integrations.timm import adapters
from dscore_plugin.integrations.torch_pruning.channel_graph import (
    ChannelGraph,
    ExactGroup,
    Permissions,
)
from dscore_plugin.integrations.torch_pruning.counting import CallRecorder, count, shares_one_weight
from dscore_plugin.integrations.torch_pruning.forms import form_of
from dscore_plugin.integrations.torch_pruning.mapping import Labels
from dscore_plugin.integrations.torch_pruning.pruners import pruner_of
from dscore_plugin.masking import register_form
from dscore_plugin.modes import modes_kept
from dscore_plugin.sharing import shared_parameters
from dscore_plugin.surgery.inputs import input_groups

_NORMS = {ops.OPTYPE.BN, ops.OPTYPE.LN, ops.OPTYPE.GN, ops.OPTYPE.IN, ops.OPTYPE.PRELU, ops.OPTYPE.CUSTOMIZED}
_LAYERS = {ops.OPTYPE.CONV, ops.OPTYPE.LINEAR, ops.OPTYPE.EMBED, ops.OPTYPE.MHA, ops.OPTYPE.LSTM}

register_form(form_of)  # whoever has groups can mask them


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
        return filters_first(module, weight)
    if handler == function.prune_linear_out_channels:
        return module.weight.detach()
    return None


class PruningGraph:
    """A traced network: its channel groups, and what each of their units costs.

    Tracing leaves the network as it was: modes, ``requires_grad`` and hooks are restored.

    Args:
        model: the network; frozen parameters and training mode are fine, parametrised weights are not.
        example_inputs: the arguments of one forward pass, with a batch dimension (a tensor stands for one argument).
        ignored: modules whose channels must stay; a container stands for everything in it.

    Attributes:
        groups: every group that DepGraph finds, in the order of the network; those that cannot be pruned
            say why in ``protected``, such as layers that share a parameter.

    Raises:
        ModelError: if a weight is parametrised, the network cannot be traced, or something else than modules is given
            for modules.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor | tuple[Any, ...],
        ignored: Sequence[nn.Module] = (),
    ) -> None:
        self.model = _checked(model)
        self.example_inputs = as_arguments(example_inputs)
        self._ignored = _all_within(ignored)
        _refuse_parametrised(model)
        recorder = CallRecorder()
        with _traceable(model), recorder.watch(model):
            self.depgraph = _build(model, self.example_inputs)
        self._terms = list(recorder.terms.values())
        self._outputs = set(recorder.outputs)
        self._calls = {grad_fn: (name, call) for name, call, grad_fn in recorder.passing}
        self._names = {module: name for name, module in model.named_modules()}
        self._kept, self._read = adapters.protected(model)
        self._shared = shared_parameters(model)
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

    def _group(self, depgroup: ExactGroup) -> ChannelGroup:
        root = self._names[depgroup[0].dep.target.module]
        channels = len(depgroup[0].idxs)
        division = math.lcm(1, *(_division(item.dep.target.module, item.dep.handler) for item in depgroup))
        division = math.lcm(division, _tied(depgroup.tie) or 1)
        if channels % division:
            reason = f"{channels} channels do not divide into the {division} groups of a grouped layer"
            return ChannelGroup(root, channels, 1, (), protected=reason)
        members = tuple(self._members(depgroup, channels // division))
        group = ChannelGroup(root, channels, division, members)
        return replace(group, protected=self._protection(depgroup, group))

    def _members(self, depgroup: Group, units: int) -> Iterator[Member]:
        for item in depgroup:
            node = item.dep.target
            index, unit = torch.as_tensor(item.idxs), torch.as_tensor(item.root_idxs) % units
            role = self._role(node, item.dep.handler)
            # an activation, alone or inside timm's norm-and-activation, or a norm without weights
            counted, call = self._calls.get(node.grad_fn, ("", 0))
            if role is not None:
                name, width = self._identity(node, role)
                yield Member(name, role, index, unit, width, call if counted == name else 0)
                counted = "" if counted == name else counted
            if counted:
                yield Member(counted, Role.PASSING, index, unit, item.width, call)

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

    def _protection(self, depgroup: ExactGroup, group: ChannelGroup) -> str:
        """Say why a group must stay, or return an empty string."""
        outs = group.roles(Role.PRODUCER, Role.DEPTHWISE, Role.NORM)
        ignored = next((m.module for m in outs if self.model.get_submodule(m.module) in self._ignored), None)
        if ignored is not None:
            return f"{ignored!r} is ignored"
        kept = next(((self._kept | self._read)[m.module] for m in group.members if self._stays(m)), None)
        if kept is not None:
            return kept
        if depgroup.is_output:
            return "its channels are an output of the network"
        shared = next(
            (name for m in group.members for name in self._parameters(m) if name in self._shared), None
        )
        if shared is not None:
            return f"{shared!r} and {self._shared[shared]!r} are one parameter"
        lost = next((reason for item in depgroup if (reason := _unprunable(item.dep.target.module))), "")
        if depgroup.problem or lost:
            return depgroup.problem or lost
        if not group.roles(Role.CONSUMER):
            return "no layer consumes its channels"
        beyond = next((m.module for m in group.members if int(m.index.max()) >= m.width), None)
        if beyond is not None:
            return f"its channels reach {beyond!r} by a way that DepGraph cannot map"
        uneven = next((m.module for m in group.members if not self._is_even(m)), None)
        if uneven is not None:
            return f"its channels reach the groups of {uneven!r} in unequal positions"
        if _tied(depgroup.tie) == 0:
            return "a reshape or a concatenation ties some of its channels to one another"
        return "it has a single unit" if group.units < 2 else ""

    def _parameters(self, member: Member) -> Sequence[str]:
        """Name the parameters that a member would lose a part of."""
        if member.role is Role.PASSING:
            return []
        if member.role is Role.PARAMETER:
            return [member.module]
        module = self.model.get_submodule(member.module)
        return [name for name, _ in module.named_parameters(member.module, recurse=False)]

    def _stays(self, member: Member) -> bool:
        """Whether a rule of timm's keeps the width that a member would lose."""
        return member.role is not Role.PASSING and member.module in (
            self._read if member.role is Role.CONSUMER else self._kept
        )

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


_PERMISSIONS = Permissions(
    splits=lambda module: bool((rule := adapters.rule_of(module)) and rule.splits),
    folds=lambda module: bool((rule := adapters.rule_of(module)) and rule.folds),
    layers=pruner_of,
)


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Unfreeze everything for tracing, and on exit restore that, the modes and the hooks.

    DepGraph follows autograd: a frozen parameter vanishes from its graph. It leaves the model in eval mode, and
    its hooks on the model if forward() raises. What a network caches meanwhile (timm's attention biases) would hold
    on to the graph.
    """
    caches = [(module, name, dict(cache)) for module in model.modules() for name, cache in _caches(module)]
    hooks = {module: list(module._forward_hooks) for module in model.modules()}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with modes_kept(model), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, name, content in caches:
            vars(module)[name] = content
        for module, known in hooks.items():
            for key in set(module._forward_hooks).difference(known):
                del module._forward_hooks[key]


def _caches(module: nn.Module) -> list[tuple[str, dict[Any, Any]]]:
    """Return the plain dictionaries that a module keeps for itself."""
    return [
        (k, value) for k, value in vars(module).items() if isinstance(value, dict) and not k.startswith("_")
    ]


def _build(model: nn.Module, example_inputs: tuple[Any, ...]) -> ChannelGraph:
    try:
        return ChannelGraph(_PERMISSIONS).build_dependency(model, example_inputs, verbose=False)
    except Exception as error:
        shapes = [tuple(x.shape) for x in example_inputs if isinstance(x, Tensor)]
        raise ModelError(
            f"{type(model).__name__} cannot be traced with inputs of shape {shapes}: {error}; "
            "check the input shape, and that forward() runs on it"
        ) from error


def _checked(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"expected a network (nn.Module), got a {type(model).__name__}; build one by name with "
            "dscore_plugin.models.create_model"
        )
    return model


def _all_within(ignored: Any) -> set[nn.Module]:
    """Return the ignored modules and everything in them."""
    found: set[nn.Module] = set()
    for thing in (ignored,) if isinstance(ignored, str | nn.Module) else ignored:
        if not isinstance(thing, nn.Module):
            raise ModelError(
                f"ignored layers are modules, not {thing!r}; from a name: model.get_submodule('layer2')"
            )
        found.update(thing.modules())
    return found


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


def _tied(tie: Labels) -> int:
    """How many channels of a root leave together, at equal distances; 0 if they are tied in another way."""
    units = len(np.unique(tie))
    if len(tie) % units or (tie != np.arange(len(tie)) % units).any():
        return 0
    return len(tie) // units


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
