"""From what was asked for to a plan: scores, sensitivity, searches, as the choice says."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dscore_plugin.datasets import ImageData
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.jobs import Choice, Source
from dscore_plugin.loading import load_object
from dscore_plugin.plan import Plan
from dscore_plugin.planning import GOALS, plan_pruning, rerank_groups, score_groups, selection_request
from dscore_plugin.registry import get_criterion
from dscore_plugin.runs import Say
from dscore_plugin.selection.kernels import plan_kernels
from dscore_plugin.selection.sensitivity import Protocol, Sensitivity, sensitivity_analysis
from dscore_plugin.training.progress import NoProgress, Progress

_TEST_IMAGES = (
    "paper protocol: the ratios are measured on the TEST images, so they know them; do not compare the result"
)


def choose(
    source: Source,
    choice: Choice,
    model: nn.Module,
    data: ImageData,
    work: Path | None = None,
    *,
    progress: Progress | None = None,
    say: Say = lambda _: None,
) -> Plan:
    """Choose what leaves a network, without touching it; selectors that optimise on the way change its weights.

    Args:
        source: where the network and the images come from.
        choice: what to choose, and how.
        model: the network.
        data: the images.
        work: a folder that takes what has been measured so far; None keeps nothing.
        progress: shows bars.
        say: takes a line of news now and then.
    """
    info, (goal, amount) = choice.info, choice.goal
    limits = {name: getattr(choice, name) for name in ("layers", "min_channels", "round_to", "latency_batch")}
    if info.kind == "selector":
        request = selection_request(
            (example_of(source, data),), choice.unit, goal, amount,
            seed=source.seed, work=work, progress=progress or NoProgress(), say=say, **limits,
        )  # fmt: skip
        return info.build_selector(**choice.criterion_options).select(model, data, request)
    if choice.unit == "kernel":
        scores = load_object(info.kernel_scores)(model, (example_of(source, data),))
        made_by = {"criterion": choice.criterion, "granularity": "kernel", goal: amount, "seed": source.seed}
        return plan_kernels(model, (example_of(source, data),), scores, ratio=amount, made_by=made_by)
    options = {name: getattr(choice, name) for name in (*GOALS, "criterion", "ratio", "allocation")} | limits
    if choice.allocation == "sensitivity":
        options["sensitivity"] = sensitivity_table(
            source, choice, model, data, work, progress=progress, say=say
        )
    if choice.analysis.rerank:
        options["rerank"] = choice.analysis.ratios
    return plan_pruning(
        model,
        example_of(source, data),
        batches=_calibration(source, choice, data),
        criterion_options=choice.criterion_options,
        seed=source.seed,
        **options,
    )


def sensitivity_table(
    source: Source,
    choice: Choice,
    model: nn.Module,
    data: ImageData,
    work: Path | None,
    *,
    progress: Progress | None = None,
    say: Say = lambda _: None,
) -> Sensitivity:
    """Read the sensitivity table that a choice names, or measure it; ``work`` takes the cells measured so far."""
    table = None if choice.table is None else Sensitivity.load(choice.table)
    analysis, info = choice.analysis, get_criterion(choice.criterion)
    protocol: Protocol = "test" if analysis.paper_protocol else "validation"
    if (table.protocol if table else protocol) == "test":
        say(_TEST_IMAGES)
    if table:
        return table
    graph = PruningGraph(model, (example_of(source, data),))
    batches = _calibration(source, choice, data)
    scored = score_groups(
        graph, info, choice.criterion_options, layers=choice.layers, batches=batches, seed=source.seed
    )
    if analysis.rerank:
        scored = rerank_groups(graph, info, scored, analysis.ratios)
    return sensitivity_analysis(
        model,
        scored,
        analysis.choose_images(data, source.seed),
        ratios=analysis.ratios,
        early_exit=analysis.early_exit,
        fold_batchnorm=analysis.fold_batchnorm,
        criterion=choice.criterion,
        protocol=protocol,
        checkpoint=None if work is None else work / "cells.jsonl",
        resume=True,
        progress=progress,
    )


def _calibration(source: Source, choice: Choice, data: ImageData) -> list[tuple[Tensor, Tensor]]:
    """Return the images that the criterion looks at, if it looks at any."""
    if not get_criterion(choice.criterion).needs_data:
        return []
    images = data.train.plain().subset(min(choice.calibration_images, len(data.train)), seed=source.seed)
    device = source.find_device()
    return [(x.to(device), y.to(device)) for x, y in images.loader(128)]


def example_of(source: Source, data: ImageData) -> Tensor:
    """Return an image of zeros for tracing, where the network is."""
    return torch.zeros(1, *data.input_shape, device=source.find_device())
