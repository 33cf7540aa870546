"""Scores for NNI's metrics: those that the importance objects give to the channel groups of DepGraph."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.dependency import Group

from dscore_plugin.errors import CriterionError, DScoreError, ModelError
from dscore_plugin.groups import ChannelGroup, Member, Role, ScoredGroup
from dscore_plugin.integrations.nni.config import Target
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.loading import load_object

Gradients = Mapping[str, Tensor]
_MAKERS = (Role.PRODUCER, Role.DEPTHWISE)


class Scorer:
    """Scores the layers that NNI masks, as the Torch-Pruning face scores the groups that they belong to.

    All layers of a group get the scores of its units, so that they lose the same channels even without dependency
    groups. A layer that DepGraph cannot prune (a classifier, the stream of an option-A residual network) is scored
    alone, by its own filters.

    Args:
        graph: the network as it was before NNI's wrappers.
        targets: what is masked.
        seed: of criteria that draw random numbers.
    """

    def __init__(self, graph: PruningGraph, targets: Mapping[str, Target], seed: int) -> None:
        self._graph, self._targets, self._seed = graph, targets, seed
        self._made = _members(graph.prunable, _MAKERS)
        self._read = _members(graph.prunable, (Role.CONSUMER,))
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def metrics(self, layers: Sequence[str]) -> dict[str, Tensor]:
        """Score layers of the network, which must be without wrappers.

        Returns:
            For each layer the scores in the shape of NNI's metrics: its weight's, with 1 for every dimension that is
            masked whole. Float64, on the CPU; the lowest is masked first.

        Raises:
            CriterionError: if a criterion cannot score a layer.
            ModelError: if weights hold NaN or infinity.
        """
        bad = next((n for n, p in self._graph.model.named_parameters() if not torch.isfinite(p).all()), None)
        if bad is not None:
            raise ModelError(f"the parameter {bad!r} holds NaN or infinity; check the checkpoint")
        looks_at_data = any(self._targets[layer].info.needs_data for layer in layers)
        key = "" if looks_at_data else f"{_digest(self._graph.model)} {sorted(layers)}"
        if not key or key != self._last[0]:  # a pruner scores when it is made, and again when it compresses
            cache: dict[Any, Any] = {}
            self._last = key, {layer: self._metric(self._targets[layer], cache) for layer in layers}
        return {layer: metric.clone() for layer, metric in self._last[1].items()}

    def complete(self, target: Target, mask: Tensor) -> Tensor:
        """Give back the channels of units that a mask takes in part: they leave together or not at all.

        Args:
            target: the layer.
            mask: of its weight or bias, as NNI made it from :meth:`metrics`.
        """
        inputs = target.granularity == "in_channel"
        members, dim = (self._read if inputs else self._made).get(target.layer, []), int(inputs)
        if target.granularity == "kernel" or mask.ndim <= dim:
            return mask
        kept = mask.clone()
        for group, member in members:
            index = member.index % mask.shape[dim]
            stays = torch.zeros(group.units, dtype=torch.bool)
            alive = mask.movedim(dim, 0).flatten(1).any(dim=1)[index] if mask.ndim > 1 else mask[index] != 0
            stays[member.unit[alive]] = True
            kept.index_fill_(dim, index[stays[member.unit]], 1)
        return kept

    def _metric(self, target: Target, cache: dict[Any, Any]) -> Tensor:
        module = self._graph.model.get_submodule(target.layer)
        weight: Tensor = module.weight  # type: ignore[assignment]
        if target.granularity == "kernel":
            return self._kernels(target, cache)[target.layer].reshape(
                *weight.shape[:2], *[1] * (weight.ndim - 2)
            )
        inputs = target.granularity == "in_channel"
        scores = self._channels(target, weight.shape[int(inputs)], cache)
        lost = bool(scores.isnan().any())
        if lost and inputs:
            raise CriterionError(
                f"no criterion scores the inputs of {target.layer!r}: {self._why_not(target.layer)}; exclude the layer"
            )
        if lost:
            scores = self._alone(target, module)
        shape = [1] * weight.ndim
        shape[int(inputs)] = -1
        return scores.reshape(shape)

    def _channels(self, target: Target, width: int, cache: dict[Any, Any]) -> Tensor:
        """Return the scores of a layer's outputs or inputs, NaN where its groups have none."""
        scores = torch.full((width,), torch.nan, dtype=torch.float64)
        for group, member in (self._read if target.granularity == "in_channel" else self._made).get(
            target.layer, []
        ):
            scored = self._group(group, target, cache)
            if scored is not None:
                scores[member.index % width] = scored.scores[member.unit]
        return scores

    def _group(self, group: ChannelGroup, target: Target, cache: dict[Any, Any]) -> ScoredGroup | None:
        key = id(target.importance)
        if key not in cache:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)  # and then the groups in order, as the Torch-Pruning face does
                cache[key] = {g.name: self._try(g, target.importance) for g in self._graph.prunable}
        scored = cache[key][group.name]
        if isinstance(scored, Exception):
            raise _cannot(target, group.name, scored)
        if scored is not None and not torch.isfinite(scored.scores).all():
            raise CriterionError(f"criterion {target.info.name!r} gives NaN or infinity for {group.name!r}")
        return scored

    def _try(self, group: ChannelGroup, importance: Callable[[Any], Any]) -> ScoredGroup | Exception | None:
        try:
            return self._graph.score(group, importance)
        except Exception as error:  # of interest only if one of the group's layers is masked
            return error

    def _alone(self, target: Target, module: nn.Module) -> Tensor:
        """Score the filters of a layer without the rest of its group."""
        depgraph = self._graph.depgraph
        try:
            prune_out = depgraph.get_pruner_of_module(module).prune_out_channels
            whole = depgraph.get_pruning_group(module, prune_out, list(range(_width(module))))
            own = Group()
            own._group, own._DG = [whole[0]], depgraph
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)
                scores = target.importance(own)
        except Exception as error:
            raise _cannot(target, target.layer, error) from error
        if scores is None or len(scores) != _width(module):
            raise CriterionError(
                f"criterion {target.info.name!r} cannot score {target.layer!r}: {self._why_not(target.layer)}; "
                "exclude the layer, or choose another criterion"
            )
        return scores.detach().to("cpu", torch.float64)

    def _kernels(self, target: Target, cache: dict[Any, Any]) -> Mapping[str, Tensor]:
        key = target.info.kernel_scores
        if key not in cache:
            scores = load_object(key)(self._graph.model, self._graph.example_inputs)
            cache[key] = {name: score.detach().to("cpu", torch.float64) for name, score in scores.items()}
        if target.layer not in cache[key]:
            raise CriterionError(
                f"criterion {target.info.name!r} scores no kernels of {target.layer!r}; exclude the layer"
            )
        return cache[key]

    def _why_not(self, layer: str) -> str:
        for group in self._graph.groups:
            if group.protected and any(member.module == layer for member in group.members):
                return group.protected
        return "no group of channels that can be pruned holds them"


@contextmanager
def gradients_set(model: nn.Module, gradients: Gradients | None) -> Iterator[None]:
    """Let the parameters carry the gathered gradients while their scores are taken; None changes nothing."""
    parameters = dict(model.named_parameters()) if gradients is not None else {}
    before = {name: parameter.grad for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.grad = (gradients or {}).get(name, torch.zeros_like(parameter))
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.grad = before[name]


def _members(
    groups: Sequence[ChannelGroup], roles: Sequence[Role]
) -> dict[str, list[tuple[ChannelGroup, Member]]]:
    found: dict[str, list[tuple[ChannelGroup, Member]]] = {}
    for group in groups:
        for member in group.roles(*roles):
            found.setdefault(member.module, []).append((group, member))
    return found


def _digest(model: nn.Module) -> str:
    """Hash a network's weights and statistics; all that a score may depend on, data and chance apart."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _width(module: nn.Module) -> int:
    return int(getattr(module, "out_channels", 0) or module.out_features)  # type: ignore[arg-type]


def _cannot(target: Target, name: str, error: Exception) -> DScoreError:
    if isinstance(error, DScoreError):
        return error
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CriterionError(
        f"criterion {target.info.name!r} cannot score {name!r}: {reason}; exclude the layer, or choose another"
    )
