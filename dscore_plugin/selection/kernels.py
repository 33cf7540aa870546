"""From scores of kernels to a plan: one threshold for the whole network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dscore_plugin.arguments import as_arguments
from dscore_plugin.costs import count
from dscore_plugin.errors import CriterionError, ModelError
from dscore_plugin.groups import removal_count
from dscore_plugin.plan import KernelRemoval, LayerRow, Plan, fingerprint
from dscore_plugin.selection.budget import check_fraction
from dscore_plugin.selection.coarse import Convolution, prunable_kernels, used_convolutions


def plan_kernels(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    scores: Mapping[str, Tensor],
    *,
    ratio: float,
    made_by: Mapping[str, Any],
    skip_first: bool = True,
    keep_at_least: int = 1,
) -> Plan:
    """Let the lowest share of all kernels leave, by one threshold over all convolutions.

    Of kernels with equal scores, those of earlier layers and lower places leave first. Kernels that a mask has
    removed already count among the lowest, so that the ratio is that of the network afterwards: the same ratio once
    more removes nothing.

    Args:
        model: the network, left as it is.
        example_inputs: the arguments of one forward pass (a tensor stands for one argument).
        scores: for every convolution, by name, shape ``(out, in / groups)``; the lowest leave first.
        ratio: share of the kernels that are gone afterwards, of those that may leave, in (0, 1).
        made_by: criterion and options, for the plan.
        skip_first: leave the first convolution whole; the paper does not say whether it does.
        keep_at_least: kernels that every convolution keeps, its strongest ones (ours: a convolution without kernels
            would cut the network in two). The share that leaves may fall short of the ratio for it.

    Returns:
        The plan. Its MACs and parameters after pruning are the effective ones: removed kernels cost nothing.

    Raises:
        BudgetError: if the ratio is out of range.
        CriterionError: if a convolution has no scores, or they have another shape or are not finite.
        ModelError: if no convolution may lose kernels.

    Source: arXiv 1811.02454, sec. 3.3: "least k % synaptic strength in the network".
    """
    return plan_kernel_ratios(
        model,
        example_inputs,
        scores,
        ratios=[ratio],
        made_by=made_by,
        skip_first=skip_first,
        keep_at_least=keep_at_least,
    )[0]


def plan_kernel_ratios(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    scores: Mapping[str, Tensor],
    *,
    ratios: Sequence[float],
    made_by: Mapping[str, Any],
    skip_first: bool = True,
    keep_at_least: int = 1,
) -> list[Plan]:
    """Make a plan for each of several ratios, from one ordering; arguments as of :func:`plan_kernels`."""
    for ratio in ratios:
        check_fraction("ratio", ratio)
    inputs = as_arguments(example_inputs)
    convolutions = used_convolutions(model, inputs)
    chosen = prunable_kernels(convolutions, skip_first)
    if not chosen:
        raise ModelError(
            "no convolution has kernels to lose but the first; prune channels, or skip_first=False"
        )
    ranked = _Ranked(chosen, [_checked(scores, c) for c in chosen], keep_at_least)
    image = next((x for x in inputs if isinstance(x, Tensor)), torch.empty(0))
    dense = _present_cost(model, inputs, convolutions)
    made = fingerprint(model)
    plans = []
    for ratio in ratios:
        gone, rows = ranked.lowest(ratio)
        saved = (sum(row.macs_saved for row in rows), ranked.params(gone))
        plans.append(
            Plan(
                made,
                tuple(image.shape[1:]),
                tuple(
                    KernelRemoval(c.name, places) for c, places in zip(chosen, gone, strict=True) if places
                ),
                tuple(rows),
                (dense[0], dense[0] - saved[0]),
                (dense[1], dense[1] - saved[1]),
                {**made_by, "ratio": ratio, "skip_first": skip_first, "keep_at_least": keep_at_least},
            )
        )
    return plans


class _Ranked:
    """All kernels of some convolutions, in the order in which they leave."""

    def __init__(self, chosen: Sequence[Convolution], scores: Sequence[Tensor], keep_at_least: int) -> None:
        self.chosen, self.scores = chosen, scores
        self.layer = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)])
        self.place = torch.cat([torch.arange(len(s)) for s in scores])
        may_leave = torch.cat([_all_but_strongest(s, keep_at_least) for s in scores])
        order = torch.argsort(torch.cat(list(scores)), stable=True)
        self.order = order[may_leave[order]]

    def lowest(self, ratio: float) -> tuple[list[tuple[int, ...]], list[LayerRow]]:
        """Return the places that leave each convolution, and the rows of the plan."""
        leaving = self.order[: removal_count(ratio, len(self.layer))]
        layers, places = self.layer[leaving], self.place[leaving]
        gone, rows = [], []
        for number, (convolution, scores) in enumerate(zip(self.chosen, self.scores, strict=True)):
            here = places[layers == number].sort().values
            cut = float(scores[here].max()) if len(here) else None
            saved = self._live_among(convolution, here) * _size(convolution) * convolution.positions
            low, high = float(scores.min()), float(scores.max())
            gone.append(tuple(here.tolist()))
            rows.append(
                LayerRow(convolution.name, convolution.kernels, low, high, cut, saved, KernelRemoval.type)
            )
        return gone, rows

    def params(self, gone: Sequence[tuple[int, ...]]) -> int:
        """Return how many weights leave that had not left before."""
        return sum(
            self._live_among(c, torch.as_tensor(places, dtype=torch.int64)) * _size(c)
            for c, places in zip(self.chosen, gone, strict=True)
        )

    @staticmethod
    def _live_among(convolution: Convolution, places: Tensor) -> int:
        return int(_live(convolution).flatten().cpu()[places].sum())


def _checked(scores: Mapping[str, Tensor], convolution: Convolution) -> Tensor:
    """Return the scores of a convolution's kernels in a row, float64."""
    shape = tuple(convolution.weight.shape[:2])
    found = scores.get(convolution.name)
    if found is None or tuple(found.shape) != shape:
        was = "none" if found is None else f"shape {tuple(found.shape)}"
        raise CriterionError(
            f"the kernels of {convolution.name!r} need scores of shape {shape}, got {was}; score every convolution"
        )
    if not torch.isfinite(found).all():
        raise CriterionError(f"the scores of {convolution.name!r} hold NaN or infinity; check the checkpoint")
    row = found.detach().to("cpu", torch.float64).flatten()
    mask = getattr(convolution.module, "kernel_mask", None)
    return row if mask is None else torch.where(mask.flatten().cpu(), row, row.min().clamp(max=0))


def _all_but_strongest(scores: Tensor, number: int) -> Tensor:
    may_leave = torch.ones(len(scores), dtype=torch.bool)
    may_leave[torch.argsort(scores, stable=True).flip(0)[: max(0, number)]] = False
    return may_leave


def _size(convolution: Convolution) -> int:
    return convolution.weight[0, 0].numel()


def _present_cost(
    model: nn.Module, example_inputs: tuple[Any, ...], convolutions: Sequence[Convolution]
) -> tuple[int, int]:
    """Count MACs of one image and parameters by Torch-Pruning's rules; kernels that are gone already cost nothing."""
    macs, params = count(model, example_inputs)
    gone = {c.name: int((~_live(c)).sum()) * _size(c) for c in convolutions}
    return macs - sum(gone[c.name] * c.positions for c in convolutions), params - sum(gone.values())


def _live(convolution: Convolution) -> Tensor:
    mask = getattr(convolution.module, "kernel_mask", None)
    return torch.ones(convolution.weight.shape[:2], dtype=torch.bool) if mask is None else mask
