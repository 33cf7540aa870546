"""D-Score, D-Step and D-Step GM: rank filters by their positive and by their negative mass.

Source: Park et al., *D-Score: A Synapse-Inspired Approach for Filter Pruning*, arXiv 2308.04470, sec. 3.1.
Every function takes the filters of one layer along dim 0 and ranks them within that layer only.
Zero weights count for neither sign, biases and norms are ignored, ties go to the lower index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dscore_plugin.criteria.precision import full_precision
from dscore_plugin.errors import CriterionError

_NOT_FINITE = "the weights hold NaN or infinity; no filter can be ranked: check the checkpoint"
_SMALL = 2**18  # differences in the distances of a layer, up to which exactness costs nothing
_CACHED = 2**18  # weights that are looked at together


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
    rank_plus, rank_minus = rank(signed_mass(weight))
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
    return _step_order(signed_mass(weight))


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
    signs = filters.new_empty(2, *filters.shape)
    torch.clamp(filters, min=0, out=signs[0])
    torch.clamp(filters, max=0, out=signs[1])
    return _step_order(summed_distances(signs))


def signed_mass(weight: Tensor) -> Tensor:
    """Sum the positive and, as a magnitude, the negative weights of each filter (Eq. 2).

    Args:
        weight: filters along dim 0, shape ``(n, ...)``; any float dtype.

    Returns:
        The positive and the negative masses, shape ``(2, n)``, float64; the order of summation breaks no tie.

    Raises:
        CriterionError: if ``weight`` has fewer than two dimensions or holds NaN or infinity.
    """
    filters, wide = as_filters(weight), _wide(weight)
    mass = torch.empty(2, len(filters), dtype=wide, device=filters.device)
    for here in _cached_rows(*filters.shape):
        mass[0, here] = filters[here].clamp(min=0).sum(dim=1, dtype=wide)
        mass[1, here] = filters[here].clamp(max=0).sum(dim=1, dtype=wide).neg()
    if not torch.isfinite(mass).all():
        raise CriterionError(_NOT_FINITE)
    return _settled(mass)


def summed_distances(points: Tensor, tile: int = 128) -> Tensor:
    """Add up each point's Euclidean distances to all points of its set.

    The matrix of distances is symmetric: only its upper tiles are computed, each from a Gram matrix in the precision
    of ``points``. Small layers are taken in float64 and difference by difference, which costs nothing there.

    Args:
        points: sets of points, shape ``(b, n, d)``, float32 or float64.
        tile: rows of one tile.

    Returns:
        Shape ``(b, n)``, float64; the order of summation breaks no tie.

    Raises:
        CriterionError: if ``points`` holds NaN or infinity.
    """
    sets, n, _ = points.shape
    if n * points.numel() <= _SMALL:
        points = _moderate(points.to(_wide(points)))
        return _settled(torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").sum(dim=2))
    square = _squared_norms(points)
    if not 2.0**-64 < float(square.amax()) < 2.0**64:
        points = _moderate(points)
        square = _squared_norms(points)
    total = torch.zeros(sets, n, dtype=_wide(points), device=points.device)
    for start in range(0, n, tile):
        # one tile of rows against everything to its right, in place: it stays in the cache
        end = start + tile
        distance = square[:, start:end, None] + square[:, None, start:]
        with full_precision(points.device.type):
            distance.baddbmm_(points[:, start:end], points[:, start:].transpose(1, 2), alpha=-2)
        distance.clamp_(min=0).sqrt_()
        distance.diagonal(dim1=1, dim2=2).zero_()  # rounding leaves a filter at a small distance from itself
        distance = distance.to(total.dtype)
        total[:, start:end] += distance.sum(dim=2)
        total[:, end:] += distance[:, :, tile:].sum(dim=1)
    return _settled(total)


def rank(values: Tensor) -> Tensor:
    """Rank from 0 for the smallest to n - 1 for the largest; ties go to the lower index.

    Args:
        values: shape ``(..., n)``, ranked along the last dimension.

    Returns:
        The same shape, int64, permutations of ``0..n-1``.
    """
    order = torch.argsort(values, stable=True)
    positions = torch.arange(values.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, positions)


def as_filters(weight: Tensor) -> Tensor:
    """View a weight as ``(n, fan_in)`` in at least float32; raise CriterionError if it has no filters."""
    if weight.ndim < 2 or not weight.is_floating_point():
        shape = tuple(weight.shape)
        raise CriterionError(
            f"expected floating-point filters along dim 0 with at least two dimensions, got {weight.dtype} {shape}"
        )
    flat = weight.detach().flatten(1)
    return flat if flat.dtype in (torch.float32, torch.float64) else flat.float()


def _cached_rows(n: int, d: int) -> Iterator[slice]:
    """Cut ``n`` rows of length ``d`` into parts whose copies stay in the cache."""
    rows = max(1, _CACHED // max(1, d))
    return (slice(start, start + rows) for start in range(0, n, rows))


def _squared_norms(points: Tensor) -> Tensor:
    square = points.new_empty(points.shape[:2])
    for here in _cached_rows(*points.shape[1:]):
        square[:, here] = points[:, here].square().sum(dim=2)
    return square


def _moderate(points: Tensor) -> Tensor:
    """Scale by a power of two, so that no square overflows or vanishes: it changes no order and rounds nothing."""
    largest = float(points.abs().amax()) if points.numel() else 0.0
    if not math.isfinite(largest):
        raise CriterionError(_NOT_FINITE)
    factor = torch.tensor(min(-math.frexp(largest)[1], 1000), device=points.device)
    return torch.ldexp(points.to(_wide(points)), factor).to(points.dtype)


def _settled(sums: Tensor) -> Tensor:
    """Round float64 to 34 bits: finer than the weights, coarser than what the order of summation changes."""
    if sums.dtype != torch.float64:
        return sums
    spread = sums * (2.0**19 + 1)  # Veltkamp's splitting
    return spread - (spread - sums)


def _wide(values: Tensor) -> torch.dtype:
    """The type to add up in: float64, which Apple's GPUs lack."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def _step_order(measures: Tensor) -> Tensor:
    rank_plus, rank_minus = rank(measures)
    n = len(rank_plus)
    # (max, sum, index) as one integer: the sum is at most 2 n, and the stable sort of `rank` keeps the index
    key = torch.maximum(rank_plus, rank_minus) * (2 * n + 1) + rank_plus + rank_minus
    return _normalised(rank(key), n - 1)


def _normalised(integers: Tensor, largest: int) -> Tensor:
    return integers.to(torch.float32) / max(1, largest)
