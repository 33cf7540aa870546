"""The whole of dependency-aware pruning: train towards sparsity, prune, train again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from dscore_plugin.artifact import save_pruned
from dscore_plugin.criteria.dependency_aware import (
    MIN_CHANNELS,
    final_threshold,
    survivors,
)
from dscore_plugin.datasets import ImageData
from dscore_plugin.errors import BudgetError, TrainingError
from dscore_plugin.files import read_json, write_json
from dscore_plugin.groups import ScoredGroup
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.integrations.torch_pruning.links import scored_layers
from dscore_plugin.plan import ChannelRemoval, InputRemoval, Plan
from dscore_plugin.planning import build_plan
from dscore_plugin.report.drawing import can_draw
from dscore_plugin.report.numbers import file_sizes
from dscore_plugin.report.plots import plot_sparsity
from dscore_plugin.report.tables import report_markdown
from dscore_plugin.runs import Say, measure, open_work
from dscore_plugin.train_jobs import METHODS, SparsityGoal, TrainJob, train_phase
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.evaluation import evaluate, recalibrate_batchnorm
from dscore_plugin.training.history import TrainingResult
from dscore_plugin.training.progress import NoProgress, Progress
from dscore_plugin.training.sparsity import DependencyAwareRegularizer, ScoredLayer


def paper_schedule(
    epochs: int = 160, retraining: int | None = None, **options: Any
) -> tuple[TrainingConfig, TrainingConfig]:
    """Return the paper's two phases on CIFAR: the sparse training and the retraining.

    Both run stochastic gradient descent with momentum 0.9, weight decay 1e-4 and batches of 64 from a learning rate
    of 0.1; it stays constant in the sparse phase (as in the published code) and falls to a tenth after one half and
    after three quarters of the retraining. For SVHN the paper takes 40 epochs, with steps after 20 and 30.

    Args:
        epochs: of the sparse phase; the paper's 160.
        retraining: epochs of the other; None takes as many.
        **options: other fields of both, such as ``seed`` or ``precision``.

    Raises:
        TrainingError: if an option is out of range.
    """
    sparse = TrainingConfig(
        epochs,
        **{"learning_rate": 0.1, "weight_decay": 1e-4, "batch_size": 64, "schedule": "constant", **options},
    )
    later = epochs if retraining is None else retraining
    milestones = tuple(sorted({later // 2, later * 3 // 4} - {0}))
    if not milestones:
        return sparse, replace(sparse, epochs=later)
    return sparse, replace(sparse, epochs=later, schedule="steps", milestones=milestones)


def run_sparse(job: TrainJob, progress: Progress | None = None, say: Say = lambda _: None) -> dict[str, Any]:
    """Train towards sparsity of channels, prune by one threshold, train again, save an artifact.

    The artifact also has ``sparsity.json`` and, where matplotlib is installed, ``.png`` and ``.svg`` (the trajectory),
    and ``history.json`` (of the retraining).

    Args:
        job: what to do; its ``sparsity`` is a :class:`~dscore_plugin.train_jobs.SparsityGoal`, its ``training`` the
            retraining.
        progress: shows bars.
        say: takes a line of news now and then.

    Returns:
        The content of ``metrics.json``: ``dense`` (after the sparse training), ``pruned``, ``recalibrated``,
        ``finetuned`` (after the retraining), each with ``top1`` in percent, ``macs``, ``params`` and ``latency_ms``;
        ``sparsity``: ``target``, ``reached``, ``threshold``, ``removed``.

    Raises:
        DScoreError: on bad input, before any work starts; or if the work fails, with what was finished kept.
    """
    goal = job.sparsity
    if not isinstance(goal, SparsityGoal):
        raise TrainingError(f"expected a SparsityGoal, got {type(goal).__name__}")
    shown = progress or NoProgress()
    job.check()
    data = job.source.load_images()
    model = job.source.build(data)
    example = (torch.zeros(1, *data.input_shape, device=next(model.parameters()).device),)
    regularizer = _regularizer(model, scored_layers(PruningGraph(model, example)), goal)
    open_work(job.work, job.identity(), say, force=job.force, resume=job.resume)

    sparse = train_phase(job, model, data, "sparse", goal.training, shown, regularizer)
    metrics: dict[str, Any] = {"dense": measure(model, data, shown)}
    say(f"trained towards sparsity: {_last(sparse)}, top-1 {metrics['dense']['top1']:.2f} %")
    if sparse.final.regularizer["sparsity"] < goal.target - 0.05:
        say(
            "the sparsity is short of its target: train longer, or raise delta; the plan takes the target anyway"
        )
    plan, metrics["sparsity"] = plan_sparsity(model, example, goal.target, min_channels=goal.min_channels)
    metrics["sparsity"]["reached"] = sparse.final.regularizer["sparsity"]
    plan.save(job.work / "plan.json")
    say(str(plan))
    plan.apply(model)
    metrics["pruned"] = measure(model, data, shown)
    recalibrate_batchnorm(model, data.train)
    metrics["recalibrated"] = {**metrics["pruned"], "top1": evaluate(model, data.test, progress=shown).top1}
    retrained = train_phase(job, model, data, "retrain", job.training, shown)
    metrics["finetuned"] = {**metrics["pruned"], "top1": evaluate(model, data.test, progress=shown).top1}
    if PartialState().is_main_process:
        _save(job, model, data, plan, metrics, sparse, retrained)
        shutil.rmtree(job.work)
        say(f"saved {job.out}; load it with dscore_plugin.load_pruned({str(job.out)!r})")
    return metrics


def plan_sparsity(
    model: nn.Module, example_inputs: tuple[Any, ...], target: float, *, min_channels: int = MIN_CHANNELS
) -> tuple[Plan, dict[str, float]]:
    """Choose what leaves a network by one threshold for all scored layers, as the paper does after its training.

    Works on any network with batch norm, trained towards sparsity or not. Only what the paper scores can leave:
    channels that one batch norm alone passes on, and the inputs behind channel selections.

    Args:
        model: the network, left as it is.
        example_inputs: the arguments of one forward pass.
        target: share of the scored channels to remove, in (0, 1).
        min_channels: that every layer keeps at least; the share that leaves may fall short of the target for it.

    Returns:
        The plan, and ``{"target", "threshold", "removed"}``: the share asked for, the threshold relative to each
        layer's maximum that gives it, and the share that leaves.

    Raises:
        BudgetError: if the target is out of range.
        ModelError: if the model cannot be traced.
        TrainingError: if nothing can be scored.
    """
    if not 0 < target < 1:
        raise BudgetError(f"target must lie between 0 and 1 (exclusive), got {target:g}")
    graph = PruningGraph(model, example_inputs)
    scored = _scored_groups(graph, scored_layers(graph))
    threshold = final_threshold([item.scores for item in scored], target)
    counts = {
        item.group.name: item.group.units
        - int(survivors(item.scores, threshold, -(-min_channels // item.group.division)).sum())
        for item in scored
    }
    made_by = {
        "criterion": METHODS[0],
        "allocation": "threshold",
        "target": target,
        "threshold": threshold,
        "min_channels": min_channels,
    }
    plan = _with_inputs(build_plan(graph, scored, counts, made_by), graph)
    removed = sum(counts.values()) / sum(item.group.units for item in scored)
    return plan, {"target": target, "threshold": threshold, "removed": removed}


def _scored_groups(graph: PruningGraph, layers: Sequence[ScoredLayer]) -> list[ScoredGroup]:
    """Return the scored groups, scores relative to each layer's maximum; the channels of a unit are averaged."""
    if not layers:
        raise TrainingError(
            f"nothing in {type(graph.model).__name__} can be scored: no batch norm alone feeds the layers behind it"
        )
    groups = {group.name: group for group in (*graph.groups, *graph.inputs)}
    scored = []
    for layer in layers:
        group = groups[layer.name]
        scores = layer.scores(graph.model).to("cpu", torch.float64).view(group.division, -1).mean(dim=0)
        scored.append(ScoredGroup(group, scores / scores.max().clamp(min=torch.finfo(torch.float64).tiny)))
    return scored


def _with_inputs(plan: Plan, graph: PruningGraph) -> Plan:
    """Mark what leaves behind a channel selection as inputs."""
    inputs = {group.name for group in graph.inputs}
    return replace(
        plan,
        removals=tuple(InputRemoval(r.layer, r.indices) if r.layer in inputs else r for r in plan.removals),
        rows=tuple(replace(row, type=InputRemoval.type) if row.layer in inputs else row for row in plan.rows),
    )


def _regularizer(
    model: nn.Module, layers: Sequence[ScoredLayer], goal: SparsityGoal
) -> DependencyAwareRegularizer:
    return DependencyAwareRegularizer(
        model, layers, goal.target, goal.training.epochs, delta=goal.delta, threshold=goal.threshold
    )


def _save(
    job: TrainJob,
    model: nn.Module,
    data: ImageData,
    plan: Plan,
    metrics: dict[str, Any],
    sparse: TrainingResult,
    retrained: TrainingResult,
) -> None:
    assert isinstance(job.sparsity, SparsityGoal)
    threshold = job.sparsity.threshold

    def report(folder: Path) -> str:
        write_json(folder / "sparsity.json", sparse.rows())
        write_json(folder / "history.json", retrained.rows())
        if can_draw():
            plot_sparsity(
                [row.regularizer for row in sparse.history], folder / "sparsity", threshold=threshold
            )
        structure = read_json(folder / "pruned_structure.json")
        sizes = file_sizes(folder)
        return report_markdown(structure, metrics, sizes=sizes, command=job.command, folder=str(job.out))

    stages = {"before": metrics["dense"], "after": metrics["pruned"]}
    save_pruned(
        model,
        job.out,
        architecture=job.source.model,
        model_args=job.source.arguments(data),
        input_shape=data.input_shape,
        plan=plan.to_dict(),
        history=[[r.layer, True, list(r.channels)] for r in plan.removals if isinstance(r, ChannelRemoval)],
        criterion=METHODS[0],
        numbers={when: {key: stage[key] for key in ("macs", "params")} for when, stage in stages.items()},
        metrics=metrics,
        report=report,
        force=job.force,
    )


def _last(result: TrainingResult) -> str:
    numbers = result.final.regularizer
    return f"{numbers['sparsity']:.1%} of the channels near zero (target {numbers['target']:.0%})"
