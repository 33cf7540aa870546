"""The criteria as importance classes: pass one to any of Torch-Pruning's pruners."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch_pruning import importance as torch_pruning_importance
from torch_pruning.dependency import Group

from dscore_plugin.criteria import d_score as d_score_criteria
from dscore_plugin.errors import CriterionError, did_you_mean
from dscore_plugin.integrations.torch_pruning.graph import Producer, producers
from dscore_plugin.integrations.torch_pruning.links import linked_score

__all__ = ["DScoreImportance", "DStepGMImportance", "DStepImportance", "DependencyAwareImportance"]

_REDUCTIONS = ("mean", "max", "first")


class FilterImportance(torch_pruning_importance.Importance):
    """Score every producer of a group with a pure function of its filters, and reduce over the producers.

    Subclasses set :attr:`criterion`, a function from filters ``(n, ...)`` to scores ``(n,)`` on one scale for
    all layers.

    Torch-Pruning removes by threshold and by an unstable ``topk``, so equal scores must not reach it. They are
    set apart by less than any two different scores of layers up to 4,096 wide: within a layer the lower index goes
    first, across layers mostly the one with the smaller mean absolute weight.

    Args:
        group_reduction: how the scores of several producers (a residual trunk, the convolution and the
            depthwise convolution behind it) become one: ``"mean"``, ``"max"``, or ``"first"``, which asks the
            root's producer alone.

    Raises:
        CriterionError: if ``group_reduction`` is unknown.
    """

    @staticmethod
    @abstractmethod
    def criterion(filters: Tensor, /) -> Tensor:
        """Score filters ``(n, ...)``: shape ``(n,)``, the lowest is pruned first."""

    def __init__(self, group_reduction: str = "mean") -> None:
        if group_reduction not in _REDUCTIONS:
            raise CriterionError(
                f"group_reduction {group_reduction!r} is unknown; expected one of {', '.join(_REDUCTIONS)}"
                + did_you_mean(str(group_reduction), _REDUCTIONS)
            )
        self.group_reduction = group_reduction

    @torch.no_grad()
    def __call__(self, group: Group) -> Tensor | None:
        """Score the channels of a group.

        Args:
            group: a group of DepGraph's, with all channels of its root or some of them.

        Returns:
            Scores of shape ``(len(group[0].idxs),)``, float64 on the CPU, all distinct; the lowest is pruned
            first. None if no layer of the group has filters.

        Raises:
            CriterionError: if weights hold NaN or infinity; the message names no layer, DepGraph knows it.
        """
        layers = list(producers(group))
        if not layers:
            return None
        layers = [layer for layer in layers if _is_trained(layer)] or layers
        if self.group_reduction == "first":
            layers = layers[:1]
        width = len(group[0].idxs)
        score = _reduce([(layer, self.score(layer)) for layer in layers], width, self.group_reduction)
        magnitude = _reduce([(layer, _magnitude(layer)) for layer in layers], width, "mean")
        return score + _apart(float(magnitude.mean()), width, magnitude)

    def score(self, layer: Producer) -> Tensor:
        """Score the filters of one layer that belong to the group: shape ``(k,)``, float64, on the CPU."""
        scores = type(self).criterion(layer.filters).to("cpu", torch.float64)
        return scores if layer.index is None else scores[layer.index]


class RankImportance(FilterImportance):
    """The base of criteria whose scores are ranks: multiples of ``1 / (2 (n - 1))``, ``n`` the layer's width."""

    def score(self, layer: Producer) -> Tensor:
        """Score as the base does, but without the rounding of float32, so that equal sums over layers stay equal."""
        steps = max(1, 2 * (len(layer.filters) - 1))
        return (super().score(layer) * steps).round() / steps


class DScoreImportance(RankImportance):
    """D-Score: the ranks of a filter's positive and of its negative mass, added.

    The score is a rank within the layer, over the layer's width. Under ``global_pruning`` it compares "the 3rd
    of 16" with "the 12th of 64": a global threshold takes about the same share of every layer, and layers differ
    only in how their two ranks agree. Of a residual sum it takes less at small ratios, more at large ones: the
    mean of several layers' ranks is drawn to the middle. The paper ranks per layer.

    Args:
        group_reduction: ``"mean"``, ``"max"`` or ``"first"``, over the producers of a group.

    Source: Park et al., arXiv 2308.04470, sec. 3.1; the pure function is ``criteria.d_score.d_score``.
    """

    criterion = staticmethod(d_score_criteria.d_score)


class DStepImportance(RankImportance):
    """D-Step: the position at which a filter enters the growing buffers of both signs.

    The score is a position in the layer's order, over its width; under ``global_pruning`` it therefore asks
    every layer for the same share (see :class:`DScoreImportance`). The paper ranks per layer.

    Args:
        group_reduction: ``"mean"``, ``"max"`` or ``"first"``, over the producers of a group.

    Source: Park et al., arXiv 2308.04470, sec. 3.1; the pure function is ``criteria.d_score.d_step``.
    """

    criterion = staticmethod(d_score_criteria.d_step)


class DStepGMImportance(RankImportance):
    """D-Step GM: D-Step on summed distances to the layer's filters, for each sign.

    The score is a position in the layer's order, over its width; under ``global_pruning`` it therefore asks
    every layer for the same share (see :class:`DScoreImportance`). The paper ranks per layer.

    Args:
        group_reduction: ``"mean"``, ``"max"`` or ``"first"``, over the producers of a group.

    Source: Park et al., arXiv 2308.04470, sec. 3.1; the pure function is ``criteria.d_score.d_step_gm``.
    """

    criterion = staticmethod(d_score_criteria.d_step_gm)


class DependencyAwareImportance(torch_pruning_importance.Importance):
    """Dependency-aware pruning: the norm's scale times what the next layer makes of the channel.

    The score is relative to the layer's maximum, as the paper's threshold is, so that ``global_pruning`` is the
    paper's pruning: one threshold for all layers. Several consumers add up. The scales of several norms add up where
    a residual sum feeds a consumer from all of them; of two norms in a row, the one nearer to the consumer counts.
    A norm without learnt scales counts as 1. Ours: scales of layer and group norms count as batch norm's do, and
    where no norm reaches a consumer the mean magnitude of a channel's own filter stands for the scale.

    The paper trains for this score (:mod:`dscore_plugin.training.sparsity`); on any other network it is post hoc.

    Source: arXiv 2005.02634; the pure function is ``criteria.dependency_aware.dependency_aware``.
    """

    @torch.no_grad()
    def __call__(self, group: Group) -> Tensor | None:
        """Score the channels of a group.

        Args:
            group: a group of DepGraph's, with all channels of its root or some of them.

        Returns:
            Scores of shape ``(len(group[0].idxs),)``, float64 on the CPU, in [0, 1] and all distinct; the lowest is
            pruned first. None if no convolution or linear layer reads the channels.

        Raises:
            CriterionError: if weights hold NaN or infinity.
        """
        score = linked_score(group)
        if score is None:
            return None
        largest = float(score.max())
        if not 0 <= largest < float("inf"):
            raise CriterionError(
                "the weights hold NaN or infinity; no channel can be scored: check the checkpoint"
            )
        return score / (largest or 1.0) + _apart(largest, len(score))


def _is_trained(layer: Producer) -> bool:
    """Whether a layer's filters were learnt; those of a fixed shortcut say nothing of the channels."""
    return bool(layer.module.weight.requires_grad)


def _reduce(scored: list[tuple[Producer, Tensor]], width: int, reduction: str) -> Tensor:
    if len(scored) == 1 and scored[0][0].root is None:
        return scored[0][1]
    total = torch.zeros(width, dtype=torch.float64)
    seen = torch.zeros(width, dtype=torch.float64)
    for layer, score in scored:
        root = torch.arange(width) if layer.root is None else layer.root
        if reduction == "max":
            total.scatter_reduce_(0, root, score, "amax")
        else:
            total.index_add_(0, root, score)
            seen.index_add_(0, root, torch.ones_like(score))
    return total if reduction == "max" else total / seen.clamp(min=1)


def _apart(mass: float, width: int, own: Tensor | None = None) -> Tensor:
    # Different scores of layers n and m wide differ by at least 1 / (4 n m), 1.5e-8 at 4,096 each. What sets equal
    # ones apart must stay far above float64's 1e-16, or large networks still hold equal scores. Layers drawn from one
    # distribution may have the same mass for all that float64 can show here; the later digits of each filter's own
    # mass then draw lots.
    apart = 5e-9 * (1 - 1 / (1 + mass)) + 5e-9 * torch.arange(width, dtype=torch.float64) / width
    return apart if own is None else apart + 1e-12 * (own / (mass or 1.0) * width % 1)


def _magnitude(layer: Producer) -> Tensor:
    """Mean absolute weight of each filter of a layer that belongs to the group: float64, on the CPU."""
    wide = torch.promote_types(layer.filters.dtype, torch.float32)
    magnitude = layer.filters.to(wide).abs().flatten(1).mean(dim=1).to("cpu", torch.float64)
    return magnitude if layer.index is None else magnitude[layer.index]
