"""A Plan's channel removals, carried out by DepGraph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch_pruning import ops

from dscore_plugin.errors import ModelError, PlanError
from dscore_plugin.groups import ChannelGroup
from dscore_plugin.integrations.timm import adapters
from dscore_plugin.integrations.timm.feature_info import follow_widths, watched
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.plan import ChannelRemoval
from dscore_plugin.rollback import rolled_back_on_error


def remove_channels(
    model: nn.Module, example_inputs: tuple[Any, ...], removals: Sequence[ChannelRemoval]
) -> nn.Module:
    """Remove channels physically, in place; frozen parameters stay frozen.

    Args:
        model: the network before pruning.
        example_inputs: the arguments of one forward pass, for tracing and for the check at the end.
        removals: which output channels leave which root layer; indices before pruning.

    Returns:
        ``model``, in eval mode.

    Raises:
        PlanError: if a removal does not fit the network.
        ModelError: if the network cannot be traced, or does not run after the removal; then it is as it was.
    """
    with watched(model) as dense:
        graph = PruningGraph(model, example_inputs)
    _check(graph, removals)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    with rolled_back_on_error(model):
        try:
            _remove(graph, [removal for removal in removals if removal.channels])
            adapters.refresh(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name not in frozen)
            model.eval()
            # no inference mode: what a network caches here must still be trainable
            with torch.no_grad(), watched(model) as pruned:
                model(*example_inputs)
            follow_widths(model, dense, pruned)
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} does not run after the removal of channels: {error}; protect the layers "
                "concerned with ignored layers, or report the architecture"
            ) from error
    return model


def _remove(graph: PruningGraph, removals: Sequence[ChannelRemoval]) -> None:
    """Take everything out of each layer at once: its channels may belong to several groups (concatenations)."""
    leaving: dict[tuple[Any, Any, int], set[int]] = {}
    for removal in removals:
        root = graph.model.get_submodule(removal.layer)
        prune_out = graph.depgraph.get_pruner_of_module(root).prune_out_channels
        for item in graph.depgraph.get_pruning_group(root, prune_out, list(removal.channels)):
            dim = item.dim if item.dep.target.type == ops.OPTYPE.PARAMETER else -1
            leaving.setdefault((item.dep.target, item.dep.handler, dim), set()).update(item.idxs)
    for (node, handler, dim), channels in leaving.items():
        handler.__self__.pruning_dim = node.pruning_dim = dim
        along = _tensors_along(node.module) if graph.depgraph.is_out_channel_pruning_fn(handler) else {}
        pruned = handler(node.module, sorted(channels))
        for name, tensor in along.items():
            kept = [c for c in range(len(tensor)) if c not in channels]
            narrow = tensor.detach()[kept]
            setattr(node.module, name, nn.Parameter(narrow) if isinstance(tensor, nn.Parameter) else narrow)
        if node.type == ops.OPTYPE.PARAMETER:
            owner, _, name = graph.depgraph.parameter_name(node).rpartition(".")
            setattr(graph.model.get_submodule(owner), name, pruned)
            node.module = pruned


def _tensors_along(module: nn.Module) -> dict[str, Any]:
    """Return what else runs along a layer's outputs; timm's standardised convolutions have a gain."""
    rule = adapters.rule_of(module)
    return {name: getattr(module, name) for name in (rule.along if rule and rule.channel_dim is None else ())}


def _check(graph: PruningGraph, removals: Sequence[ChannelRemoval]) -> None:
    groups = {group.name: group for group in graph.groups}
    layers = [removal.layer for removal in removals]
    twice = next((layer for layer in layers if layers.count(layer) > 1), None)
    if twice is not None:
        raise PlanError(f"the plan names {twice!r} twice; put all of its channels into one entry")
    for removal in removals:
        group = groups.get(removal.layer)
        if group is None:
            raise PlanError(f"the network has no group of channels named {removal.layer!r}; make a new plan")
        _check_group(group, removal.channels)


def _check_group(group: ChannelGroup, channels: tuple[int, ...]) -> None:
    if group.protected:
        raise PlanError(f"{group.name!r} must not be pruned: {group.protected}")
    if channels and not 0 <= min(channels) <= max(channels) < group.channels:
        raise PlanError(
            f"{group.name!r} has channels 0..{group.channels - 1}; the plan names {min(channels)}..{max(channels)}"
        )
    try:
        units = group.units_of(channels)
    except ValueError as error:
        raise PlanError(str(error)) from error
    if len(units) >= group.units:
        raise PlanError(
            f"the plan removes all {group.channels} channels of {group.name!r}; keep at least one"
        )
