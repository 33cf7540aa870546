"""Dependency-aware filter pruning: a channel counts for what its norm lets through and the next layer makes of it.

Source: Zhao et al., *Dependency-Aware Filter Pruning*, arXiv 2005.02634. Scores are compared within a layer only,
relative to the layer's maximum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dscore_plugin.errors import BudgetError, CriterionError

TRAINING_THRESHOLD = 0.02  # of the layer's maximum: what counts as near zero while training
MIN_CHANNELS = 8


def dependency_aware(gamma: Tensor, next_weight: Tensor) -> Tensor:
    """Multiply each channel's batch-norm scale with the mean magnitude of the weights that read it.

    ``S_c = |gamma_c| * mean_{o,i,j} |W_next[o, c, i, j]|``. A channel with several consumers has the sum of
    its scores with each of them.

    Args:
        gamma: the scales, shape ``(n,)``; any float dtype.
        next_weight: of the layer behind the norm: a convolution ``(out, n, ...)``, a grouped one
            ``(out, n / groups, ...)``, where a channel is read by its own group's filters only, or a linear
            layer ``(out, n)``; behind a flatten ``(out, n * positions)``, channel by channel.

    Returns:
        Scores of shape ``(n,)``, float32, at least 0; the lowest is pruned first.

    Raises:
        CriterionError: if the shapes do not fit each other, or a tensor holds NaN or infinity.

    Source: arXiv 2005.02634 and its published code.
    """
    if gamma.ndim != 1 or not gamma.is_floating_point():
        raise CriterionError(f"expected floating-point scales of shape (n,), got {_described(gamma)}")
    score = (gamma.detach().abs().to(torch.float64) * input_mass(next_weight, len(gamma))).float()
    if not torch.isfinite(score).all():
        raise CriterionError("the scales or weights hold NaN or infinity; check the checkpoint")
    return score


def input_mass(weight: Tensor, channels: int) -> Tensor:
    """Average the magnitudes of the weights that read each input channel.

    Args:
        weight: of a convolution or a linear layer, as for :func:`dependency_aware`.
        channels: the input channels ``n``.

    Returns:
        Shape ``(n,)``, float64.

    Raises:
        CriterionError: if a weight of this shape cannot read ``n`` channels.
    """
    if weight.ndim < 2 or not weight.is_floating_point() or 0 in (channels, *weight.shape):
        raise CriterionError(
            f"expected the weight of a convolution or a linear layer, got {_described(weight)}"
        )
    magnitude = weight.detach().abs().to(torch.float64)
    outputs, inputs = weight.shape[:2]
    if weight.ndim == 2 and inputs % channels == 0:
        return magnitude.view(outputs, channels, -1).mean(dim=(0, 2))
    groups = channels // inputs
    if weight.ndim > 2 and groups * inputs == channels and outputs % groups == 0:
        return magnitude.view(groups, outputs // groups, inputs, -1).mean(dim=(1, 3)).flatten()
    raise CriterionError(f"{channels} channels do not fit a layer with a weight of {_described(weight)}")


def sparsity(scores: Sequence[Tensor], threshold: float) -> float:
    """Return the share of channels that lie near zero: ``P(thr) = #{c: S_c <= thr * max S} / #{c}``.

    Args:
        scores: for each layer, shape ``(n,)``, at least 0.
        threshold: relative to each layer's own maximum.

    Raises:
        CriterionError: if there are no channels.
    """
    channels = sum(len(layer) for layer in scores)
    if not channels:
        raise CriterionError(
            "there are no scored channels, so they have no sparsity; give at least one layer"
        )
    return sum(int(_near_zero(layer, threshold).sum()) for layer in scores) / channels


def final_threshold(
    scores: Sequence[Tensor], target: float, *, tolerance: float = 1e-3, iterations: int = 60
) -> float:
    """Find, by bisection, the threshold below which a given share of all channels lies.

    Args:
        scores: for each layer, shape ``(n,)``, at least 0.
        target: the share ``P*`` in ``[0, 1]``.
        tolerance: ``|P - P*|`` that is good enough; half a channel always is.
        iterations: at most; they end at the nearest share that equal scores allow.

    Returns:
        The threshold, in ``[0, 1]``, relative to each layer's maximum.

    Raises:
        BudgetError: if the target is out of range.
        CriterionError: if there are no channels.
    """
    if not 0 <= target <= 1:
        raise BudgetError(f"the target sparsity must lie between 0 and 1, got {target:g}")
    low, high = 0.0, 1.0
    close = max(tolerance, 0.5 / max(1, sum(len(layer) for layer in scores))) + 1e-12
    for _ in range(iterations):
        middle = (low + high) / 2
        reached = sparsity(scores, middle)
        if abs(reached - target) <= close:
            return middle
        low, high = (middle, high) if reached < target else (low, middle)
    return min(low, high, key=lambda threshold: abs(sparsity(scores, threshold) - target))


def survivors(scores: Tensor, threshold: float, min_channels: int = MIN_CHANNELS) -> Tensor:
    """Choose the channels of one layer that stay: those above the threshold, or the best few.

    Args:
        scores: shape ``(n,)``, at least 0.
        threshold: relative to the layer's maximum.
        min_channels: at least so many stay (all, where there are no more); ties go to the lower index,
            which leaves first.

    Returns:
        True for those that stay, shape ``(n,)``, bool.
    """
    stay = ~_near_zero(scores, threshold)
    if int(stay.sum()) < min_channels:
        stay = torch.zeros_like(stay)
        stay[torch.argsort(scores, stable=True)[-min_channels:]] = True
    return stay


def _near_zero(scores: Tensor, threshold: float) -> Tensor:
    return scores <= threshold * scores.max()


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
