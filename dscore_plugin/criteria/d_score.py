"""D-Score, D-Step and D-Step GM: rank filters by their positive and by their negative mass.

Source: Park et al., *D-Score: A Synapse-Inspired Approach for Filter Pruning*, arXiv 2308.04470, sec. 3.1.
Every function takes the filters of one layer along dim 0 and ranks them within that layer only.
Zero weights count for neither sign, biases and norms are ignored, ties go to the lower index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dscore_plugin.errors import CriterionError


def d_score(weight: Tensor) -> Tensor:
    """Add the ranks of a filter's excitatory and of its inhibitory mass (Dynamic Score).

    ``score = (rank_plus + rank_minus) / (2 (n - 1))`` with integer ranks ``0..n-1`` (Eq. 1, 2; the paper counts
    from 1, which changes no order). Divided once, so that equal rank sums stay equal scores.

    Args:
        weight: filters along dim 0, shape ``(n, ...)``; any float dtype.

    Returns:
        Scores of shape ``(n,)``, float32, in ``[0, 1]``; the lowest is pruned first. ``n = 1`` scores 0.

    Raises:
        CriterionError: if ``weight`` has fewer than two dimensions or holds NaN or infinity.

    Source: arXiv 2308.04470, sec. 3.1.
    """
    rank_plus, rank_minus = (rank(mass) for mass in signed_mass(weight))
    return _normalised(rank_plus + rank_minus, 2 * (len(weight) - 1))


def d_step(weight: Tensor) -> Tensor:
    """Order filters by the step at which the growing buffers of both signs have reached them (Dynamic Step).

    The paper grows a prefix of both orders and prunes what lies in both; a filter enters at step
    ``max(rank_plus, rank_minus)``, and of two that enter together the smaller rank sum goes first.

    Args:
        weight: filters along dim 0, shape ``(n, ...)``; any float dtype.

    Returns:
        Positions in that order over ``n - 1``: shape ``(n,)``, float32, in ``[0, 1]``, all distinct.

    Raises:
        CriterionError: if ``weight`` has fewer than two dimensions or holds NaN or infinity.

    Source: arXiv 2308.04470, sec. 3.1.
    """
    return _step_order(*signed_mass(weight))


def d_step_gm(weight: Tensor) -> Tensor:
    """D-Step on summed Euclidean distances instead of masses: filters near all others go first.

    For each sign the other sign's weights are set to zero and every filter's distances to all filters of the
    layer are added up (the geometric-median idea of FPGM, once per sign); then the order of :func:`d_step`.

    Args:
        weight: filters along dim 0, shape ``(n, ...)``; any float dtype.

    Returns:
        Positions in that order over ``n - 1``: shape ``(n,)``, float32, in ``[0, 1]``, all distinct.

    Raises:
        CriterionError: if ``weight`` has fewer than two dimensions or holds NaN or infinity.

    Source: arXiv 2308.04470, sec. 3.1.
    """
    filters = as_filters(weight)
    return _step_order(summed_distances(filters.clamp(min=0)), summed_distances(filters.clamp(max=0)))


def signed_mass(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the positive and, as a magnitude, the negative weights of each filter (Eq. 2).

    Args:
        weight: filters along dim 0, shape ``(n, ...)``; any float dtype.

    Returns:
        Two tensors of shape ``(n,)``, float32. Added up in float64, so that the order of summation breaks no tie.

    Raises:
        CriterionError: if ``weight`` has fewer than two dimensions or holds NaN or infinity.
    """
    filters = as_filters(weight)
    plus = filters.clamp(min=0).sum(dim=1, dtype=_wide(filters)).float()
    minus = filters.clamp(max=0).sum(dim=1, dtype=_wide(filters)).neg().float()
    if not torch.isfinite(plus + minus).all():
        raise CriterionError(
            "the weights hold NaN or infinity; no filter can be ranked: check the checkpoint"
        )
    return plus, minus


def summed_distances(points: Tensor, tile: int = 128) -> Tensor:
    """Add up each point's Euclidean distances to all points.

    The matrix of distances is symmetric: only its upper tiles are computed, each from a Gram matrix.

    Args:
        points: shape ``(n, d)``, float32 or float64.
        tile: rows of one tile.

    Returns:
        Shape ``(n,)``, float32; each distance and the sums are taken in at least the precision of ``points``.

    Raises:
        CriterionError: if ``points`` holds NaN or infinity.
    """
    square = points.square().sum(dim=1)
    if not torch.isfinite(square).all():
        raise CriterionError(
            "the weights hold NaN or infinity; no filter can be ranked: check the checkpoint"
        )
    total = torch.zeros(len(points), dtype=_wide(points), device=points.device)
    for start in range(0, len(points), tile):
        # one tile of rows against everything to its right, in place: it stays in the cache
        rows = slice(start, start + tile)
        distance = torch.addmm(square[start:], points[rows], points[start:].T, alpha=-2)
        distance.add_(square[rows, None]).clamp_(min=0).sqrt_()
        distance[:, :tile].fill_diagonal_(0)  # rounding leaves a filter at a small distance from itself
        total[rows] += distance.sum(dim=1, dtype=total.dtype)
        total[start + tile :] += distance[:, tile:].sum(dim=0, dtype=total.dtype)
    return total.float()


def rank(values: Tensor) -> Tensor:
    """Rank from 0 for the smallest to n - 1 for the largest; ties go to the lower index.

    Args:
        values: shape ``(n,)``.

    Returns:
        Shape ``(n,)``, int64, a permutation of ``0..n-1``.
    """
    order = torch.argsort(values, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device)
    return ranks


def as_filters(weight: Tensor) -> Tensor:
    """View a weight as ``(n, fan_in)`` in at least float32; raise CriterionError if it has no filters."""
    if weight.ndim < 2 or not weight.is_floating_point():
        shape = tuple(weight.shape)
        raise CriterionError(
            f"expected floating-point filters along dim 0 with at least two dimensions, got {weight.dtype} {shape}"
        )
    flat = weight.detach().flatten(1)
    return flat if flat.dtype in (torch.float32, torch.float64) else flat.float()


def _wide(values: Tensor) -> torch.dtype:
    """The type to add up in: float64, which Apple's GPUs lack."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def _step_order(first: Tensor, second: Tensor) -> Tensor:
    rank_first, rank_second = rank(first), rank(second)
    n = len(first)
    # (max, sum, index) as one integer: the sum is at most 2 n, and the stable sort of `rank` keeps the index
    key = torch.maximum(rank_first, rank_second) * (2 * n + 1) + rank_first + rank_second
    return _normalised(rank(key), n - 1)


def _normalised(integers: Tensor, largest: int) -> Tensor:
    return integers.to(torch.float32) / max(1, largest)
