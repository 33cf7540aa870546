"""From metrics to masks: NNI's rules in NNI's order, but a global rule that meets its ratio.

NNI's own takes too much where layers have blocks of different sizes, how much depends on the order of the layers, which
changes from one process to the next, and it applies minima and maxima to the whole group only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.pruning.tools import sparse_gen
from torch import Tensor

Masks = dict[str, dict[str, Tensor]]
Spaces = Mapping[str, Mapping[str, PruningTargetSpace]]


def generate_sparsity(metrics: Masks, spaces: Spaces) -> Masks:
    """Make masks: by threshold, dependency group, global group, ratio, and aligned with other masks.

    Args:
        metrics: ``{layer: {target: metric}}``; the lowest is masked first.
        spaces: NNI's target spaces, of all that is masked.

    Returns:
        ``{layer: {target: mask}}``, 1 keeps and 0 takes, broadcastable to the targets.
    """
    rules: list[tuple[Any, Any]] = [
        (lambda space: space.dependency_group_id is not None, sparse_gen._generate_dependency_sparsity),
        (lambda space: space.global_group_id is not None, _global_masks),
        (lambda space: space.sparse_ratio is not None, sparse_gen._generate_ratio_sparsity),
    ]
    masks: Masks = defaultdict(dict)

    def add(chosen: Spaces, made: Masks) -> None:
        sparse_gen._nested_multiply_update_masks(masks, sparse_gen._expand_masks(made, chosen))

    chosen, _ = sparse_gen.target_spaces_filter(spaces, lambda space: space.sparse_threshold is not None)
    add(chosen, sparse_gen._generate_threshold_sparsity(metrics, chosen))
    rest = spaces
    for condition, generate in rules:
        chosen, rest = sparse_gen.target_spaces_filter(rest, condition)
        add(chosen, generate(metrics, chosen))
    chosen, _ = sparse_gen.target_spaces_filter(rest, lambda space: space.align is not None)
    add(chosen, sparse_gen._generate_align_sparsity(masks, chosen))
    return dict(masks)


class _Member(NamedTuple):
    layer: str
    target: str
    space: PruningTargetSpace


def _global_masks(metrics: Masks, spaces: Spaces) -> Masks:
    """Mask the lowest metrics of each global group, as many as its ratio of weights allows and not one more."""
    groups: dict[Any, list[_Member]] = defaultdict(list)
    for layer, targets in spaces.items():
        for target, space in targets.items():
            groups[space.global_group_id].append(_Member(layer, target, space))
    masks: Masks = defaultdict(dict)
    for members in groups.values():
        taken = _take([metrics[m.layer][m.target].flatten() for m in members], [m.space for m in members])
        for member, gone in zip(members, taken, strict=True):
            metric = metrics[member.layer][member.target]
            masks[member.layer][member.target] = (~gone).to(metric.dtype).view(metric.shape)
    return masks


def _take(metrics: Sequence[Tensor], spaces: Sequence[PruningTargetSpace]) -> list[Tensor]:
    """Say which blocks leave; equal metrics of several layers (a channel group's) leave together or stay."""
    sizes = [
        space.target.numel() // len(metric) for metric, space in zip(metrics, spaces, strict=True)
    ]  # of a block
    ratio = next((space.sparse_ratio for space in spaces if space.sparse_ratio is not None), 0.0)
    ranks = [metric.argsort(stable=True).argsort() for metric in metrics]
    forced = [
        rank < int(len(rank) * (space.min_sparse_ratio or 0.0))
        for rank, space in zip(ranks, spaces, strict=True)
    ]
    free = [
        (rank < int(len(rank) * (space.max_sparse_ratio or 1.0))) & ~must
        for rank, space, must in zip(ranks, spaces, forced, strict=True)
    ]
    spent = sum(int(must.sum()) * size for must, size in zip(forced, sizes, strict=True))
    total = sum(len(metric) * size for metric, size in zip(metrics, sizes, strict=True))
    values = torch.cat([metric[may] for metric, may in zip(metrics, free, strict=True)])
    costs = torch.cat(
        [torch.full((int(may.sum()),), float(size)) for may, size in zip(free, sizes, strict=True)]
    )
    levels, at = torch.unique(values, return_inverse=True)  # sorted
    running = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, at, costs.double()).cumsum(0)
    affordable = int((running <= int(total * ratio + 1e-9) - spent).sum())
    limit = levels[affordable - 1] if affordable else torch.tensor(-torch.inf)
    return [must | (may & (metric <= limit)) for metric, may, must in zip(metrics, free, forced, strict=True)]
