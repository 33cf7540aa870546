"""From a channel's norm to the layers that read it: the links that dependency-aware pruning scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning._helpers import GroupItem
from torch_pruning.dependency import Group
from torch_pruning.pruner import function

from dscore_plugin.criteria.dependency_aware import input_mass
from dscore_plugin.filters import filters_first
from dscore_plugin.groups import ChannelGroup
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.training.sparsity import ScoredLayer

_NORMS = {ops.OPTYPE.BN, ops.OPTYPE.LN, ops.OPTYPE.GN, ops.OPTYPE.IN}
_CONSUMING = (function.prune_conv_in_channels, function.prune_linear_in_channels)
_PRODUCING = (
    function.prune_conv_out_channels,
    function.prune_depthwise_conv_out_channels,
    function.prune_linear_out_channels,
)


@dataclass(frozen=True)
class Link:
    """A layer that reads a group's channels, and the layers whose output reaches it without another in between.

    Attributes:
        consumer: the group's item for the layer's input channels.
        sources: norms; only where no norm reaches the consumer, the layers that produce the channels.
    """

    consumer: GroupItem
    sources: tuple[GroupItem, ...]


def links(group: Group) -> Iterator[Link]:
    """Walk the convolutions and linear layers that read a group's channels, and say what feeds each.

    Args:
        group: a group of DepGraph's.

    Yields:
        The links in the group's order. A residual sum feeds a consumer from several norms; of two norms in a row
        (around a depthwise convolution) only the second feeds it.
    """
    inside = {item.dep.target for item in group}
    norms = {item.dep.target: item for item in group if item.dep.target.type in _NORMS}
    makers = {item.dep.target: item for item in group if item.dep.handler in _PRODUCING}
    for item in group:
        if item.dep.handler in _CONSUMING:
            reached = _upstream(item.dep.target, norms.keys() | makers.keys(), inside)
            sources = [norms[node] for node in reached if node in norms]
            sources = sources or [makers[node] for node in reached] or list((norms or makers).values())
            if sources:
                yield Link(item, tuple(sources))


def _upstream(node: Any, ends: Any, inside: set[Any]) -> list[Any]:
    """Return the nearest nodes of ``ends`` against the direction of the data, staying inside the group."""
    found, seen, waiting = [], {node}, list(node.inputs)
    while waiting:
        current = waiting.pop(0)
        if current in seen or current not in inside:
            continue
        seen.add(current)
        if current in ends:
            found.append(current)
        else:
            waiting += current.inputs
    return found


def linked_score(group: Group) -> Tensor | None:
    """Score a group's channels: over all links, the scales of the sources times the mass of the consumer.

    ``S_c = sum_links (sum_sources |gamma_c|) * mean |W_next[:, c]|``; where no norm reaches a consumer, the mean
    magnitude of the channel's own filter stands for ``|gamma_c|``.

    Args:
        group: a group of DepGraph's, with all channels of its root or some of them.

    Returns:
        Scores of shape ``(len(group[0].idxs),)``, float64, on the CPU; None if nothing reads the channels.
    """
    width = len(group[0].idxs)
    place = {channel: position for position, channel in enumerate(group[0].idxs)}
    score, found = torch.zeros(width, dtype=torch.float64), False
    for link in links(group):
        mass = _at_root(link.consumer, _consumed(link.consumer), place)
        scales = [_at_root(source, _scale(source), place) for source in link.sources]
        if mass is not None and None not in scales:
            score, found = score + mass * sum(scales), True  # type: ignore[arg-type]
    return score if found else None


def _at_root(item: GroupItem, values: Tensor, place: dict[int, int]) -> Tensor | None:
    """Average a layer's values over the positions of each of the root's channels; None if DepGraph lost them."""
    root = [place.get(channel, -1) for channel in item.root_idxs]
    if -1 in root or max(item.idxs) >= len(values):
        return None
    index, total = torch.as_tensor(root), torch.zeros(2, len(place), dtype=torch.float64)
    chosen = values.to("cpu", torch.float64)[torch.as_tensor(item.idxs)]
    total.index_add_(1, index, torch.stack([chosen, torch.ones_like(chosen)]))
    return total[0] / total[1].clamp(min=1)


def _consumed(item: GroupItem) -> Tensor:
    """Return the mean magnitude of the weights that read each input channel of a layer."""
    module = item.dep.target.module
    inputs = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    return input_mass(filters_first(module, module.weight), inputs)


def _scale(item: GroupItem) -> Tensor:
    """Return the magnitude of a norm's scale, or of a layer's filters, for each of its channels."""
    module = item.dep.target.module
    if item.dep.target.type in _NORMS:
        width = int(max(item.idxs)) + 1
        return torch.ones(width) if module.weight is None else module.weight.detach().abs()
    return filters_first(module, module.weight.detach()).abs().flatten(1).mean(dim=1)


def scored_layers(graph: PruningGraph) -> tuple[ScoredLayer, ...]:
    """Find what the paper scores: batch norms that alone feed the layers behind them.

    The channels of a residual stream are left out, as in the paper, and so is everything without batch norm.
    Behind a stream's norm, the inputs of a block can be scored where a channel selection makes them removable.

    Args:
        graph: the traced network.

    Returns:
        The layers in the network's order of groups, the inputs last.
    """
    names = {module: name for name, module in graph.model.named_modules()}
    found = [
        layer
        for group in graph.prunable
        if group.is_inner and (layer := _scored_group(group, list(links(graph.depgroups[group.name])), names))
    ]
    fed = {
        names[link.consumer.dep.target.module]: link for g in graph.depgroups.values() for link in links(g)
    }
    for group in graph.inputs:
        behind = [fed[member.module] for member in group.members if member.module in fed]
        if len(behind) == len(group.members) and (layer := _scored_group(group, behind, names)):
            found.append(layer)
    return tuple(found)


def _scored_group(group: ChannelGroup, found: Sequence[Link], names: dict[Any, str]) -> ScoredLayer | None:
    """Return a group as one norm and its consumers, if it is that and every channel stands in its place."""
    sources = {source.dep.target.module for link in found for source in link.sources}
    items = [item for link in found for item in (link.consumer, *link.sources)]
    if len(sources) != 1 or not all(_in_order(item, group.channels) for item in items):
        return None
    (norm,) = sources
    if not isinstance(norm, ops.TORCH_BATCHNORM) or norm.weight is None:
        return None
    if norm.num_features != group.channels or not norm.weight.requires_grad:
        return None
    consumers = sorted(names[link.consumer.dep.target.module] for link in found)
    return ScoredLayer(group.name, names[norm], tuple(consumers))


def _in_order(item: GroupItem, channels: int) -> bool:
    """Whether the root's channels stand in order in a layer's, each at equally many neighbouring positions."""
    positions, rest = divmod(len(item.idxs), channels)
    expected = [place // max(1, positions) for place in range(len(item.idxs))]
    pairs = sorted(zip(item.idxs, item.root_idxs, strict=True))
    return rest == 0 and pairs == list(enumerate(expected))
