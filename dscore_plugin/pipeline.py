"""One pruning run, readable from top to bottom: load, score, select, remove, save, fine-tune, report."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from dscore_plugin.artifact import load_pruned, read_structure, save_pruned
from dscore_plugin.costs import count
from dscore_plugin.datasets import ImageData, ImageSet
from dscore_plugin.errors import ArtifactError, ModelError, TrainingError
from dscore_plugin.files import atomic_folder, ensure_writable, read_json, write_json
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.jobs import Choice, PruneJob, Source, amount_in_round
from dscore_plugin.loading import load_object
from dscore_plugin.plan import ChannelRemoval, Plan
from dscore_plugin.planning import GOALS, plan_pruning, rerank_groups, score_groups, selection_request
from dscore_plugin.registry import get_criterion
from dscore_plugin.report.kernel_numbers import kernel_report, sparse_latency
from dscore_plugin.report.numbers import file_sizes, latency
from dscore_plugin.report.pictures import draw_pictures
from dscore_plugin.report.plots import plot_sensitivity
from dscore_plugin.report.tables import report_markdown
from dscore_plugin.selection.kernels import plan_kernels
from dscore_plugin.selection.processes import Processes
from dscore_plugin.selection.sensitivity import Sensitivity, check_ratios, sensitivity_analysis
from dscore_plugin.surgery.kernel_masks import kernel_masks
from dscore_plugin.surgery.layers import find_branches
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.evaluation import evaluate, images_of_statistics, recalibrate_batchnorm
from dscore_plugin.training.loop import train
from dscore_plugin.training.progress import NoProgress, Progress

Say = Callable[[str], None]


def run_prune(job: PruneJob, progress: Progress | None = None, say: Say = lambda _: None) -> dict[str, Any]:
    """Prune a network end to end and save the artifact.

    Args:
        job: what to do.
        progress: shows bars.
        say: takes a line of news now and then.

    Returns:
        The content of ``metrics.json``: ``dense``, ``pruned``, ``recalibrated`` and ``finetuned``, each with
        ``top1`` in percent, ``macs``, ``params`` and ``latency_ms``, or None where it was not run. ``recalibrated``
        says with ``statistics_of`` which images it saw, ``augmented`` or ``plain``: those that the network's own
        statistics stem from. The last three are those of the last stage; where there are several, ``stages`` has
        those of each. Where kernels are gone, ``kernels`` has MACs and parameters with and without them.
        ``scoring_seconds`` is the time from the network to the plan, over all stages, None where an interruption
        hides it; ``validation_top1`` that of the last epoch, None without fine-tuning.

    Raises:
        DScoreError: on bad input, before any work starts; or if the work fails, with what was finished kept.
    """
    shown = progress or NoProgress()
    job.check()
    if Processes().number > 1:
        raise TrainingError(
            "dscore prune runs in one process; prune without epochs, then fine-tune the artifact under the launcher "
            "(examples/imagenet_finetune.py --artifact)"
        )
    data = job.source.load_images()
    model = job.source.build(data)
    open_work(job.work, job.identity(), say, force=job.force, resume=job.resume)

    model = _dense(job, model, data, shown, say)
    teacher = copy.deepcopy(model) if job.training and job.training.distils else None
    dense = measure(model, data, shown)
    say(f"dense: top-1 {dense['top1']:.2f} %, {dense['macs'] / 1e6:.1f} M MACs")

    stages = _finished_stages(job)
    if stages:
        model = load_pruned(_stage_folder(job, len(stages)) / "model").to(job.source.find_device())
    for number in range(len(stages) + 1, len(job.stages) + 1):
        stages.append(_run_stage(job, number, model, teacher, data, dense, shown, say))
        if number < len(job.stages):
            _save(job, model, data, dense, stages, _stage_folder(job, number) / "model")

    metrics = _save(job, model, data, dense, stages, job.out)
    shutil.rmtree(job.work)
    say(f"saved {job.out}; load it with dscore_plugin.load_pruned({str(job.out)!r})")
    return metrics


def _run_stage(
    job: PruneJob,
    number: int,
    model: nn.Module,
    teacher: nn.Module | None,
    data: ImageData,
    dense: dict[str, Any],
    progress: Progress,
    say: Say,
) -> dict[str, Any]:
    """Choose, remove, measure, recalibrate, fine-tune; return the stage's plan and numbers."""
    work = _stage_folder(job, number)
    form = images_of_statistics(model, data.train)
    plan, seconds = _timed_plan(job, number, model, data, dense, work, progress, say)
    plan.save(work / "plan.json")
    say(str(plan))
    plan.apply(model)
    stage: dict[str, Any] = {"plan": plan.to_dict(), "pruned": measure(model, data, progress)}
    stage["scoring_seconds"] = seconds
    training = job.training if number == len(job.stages) else job.round_training
    stage["recalibrated"] = _recalibrated(job, model, data, form, stage["pruned"], progress)
    stage["finetuned"], stage["validation_top1"] = _finetuned(
        job, model, teacher, data, stage["pruned"], training, work / "finetune", progress, say
    )
    return stage


def _stage_folder(job: PruneJob, number: int) -> Path:
    return job.work if len(job.stages) == 1 else job.work / f"stage-{number}"


def _finished_stages(job: PruneJob) -> list[dict[str, Any]]:
    """Read what the stages before the last left behind, as far as an interrupted run came."""
    for number in range(len(job.stages) - 1, 0, -1):
        folder = _stage_folder(job, number) / "model"
        if folder.exists():
            return list(read_json(folder / "metrics.json")["stages"])
    return []


def run_plan(source: Source, choice: Choice, say: Say = lambda _: None) -> Plan:
    """Choose what leaves a network, without touching it."""
    choice.check()
    if source.weights is None:
        raise ModelError("a plan needs trained weights; pass --weights FILE")
    data = source.load_images()
    return _choose(source, choice, source.build(data), data)


def run_sensitivity(
    source: Source,
    choice: Choice,
    out: Path,
    *,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    say: Say = lambda _: None,
) -> Sensitivity:
    """Measure the sensitivity of every layer and write the table and its picture.

    Args:
        source: the network, with its weights, and the images.
        choice: the criterion, and how to measure.
        out: the folder that takes ``sensitivity.json``, ``.csv``, ``.png`` and ``.svg``.
        force: replace it.
        resume: go on with an interrupted analysis.
        progress: shows bars.
        say: takes a line of news now and then.

    Returns:
        The table.

    Raises:
        DScoreError: on bad input, before any work starts.
    """
    ensure_writable(out, force)
    get_criterion(choice.criterion)
    check_ratios(choice.analysis.ratios)
    if source.weights is None:
        raise ModelError("a sensitivity analysis needs trained weights; pass --weights FILE")
    work = out.with_name(out.name + ".work")
    if work.exists() and not (resume or force):
        raise ArtifactError(
            f"{work} holds an unfinished analysis; go on with --resume, or start over with --force"
        )
    if work.exists() and not resume:
        shutil.rmtree(work)
    data = source.load_images()
    if choice.analysis.paper_protocol:
        say(
            "paper protocol: the ratios are measured on the TEST images, so they know them; do not compare the result"
        )
    table = _table(source, choice, source.build(data), data, work, progress=progress)
    if PartialState().is_main_process:
        with atomic_folder(out, force) as folder:
            table.save(folder)
            plot_sensitivity(table, folder / "sensitivity")
        shutil.rmtree(work)
        say(f"saved {out}: sensitivity.json, .csv, .png, .svg")
    return table


def run_evaluate(folder: Path | None, source: Source, progress: Progress | None = None) -> dict[str, Any]:
    """Measure a saved artifact, or a dense network, on the test images.

    Args:
        folder: an artifact; None measures the network that ``source`` names.
        source: the images, and the dense network with its weights.
        progress: shows bars.

    Returns:
        ``{"top1", "images", "macs", "params", "latency_ms"}``, and ``"sparse_latency_ms"`` where kernels are gone.

    Raises:
        DScoreError: on bad input.
    """
    if folder is None and source.weights is None:
        raise ModelError("a dense network needs trained weights; pass --weights FILE, or name an artifact")
    if folder is not None:
        read_structure(folder)  # before the images, which may take long to load
    data = source.load_images()
    model = source.build(data) if folder is None else load_pruned(folder).to(source.find_device())
    found = {**measure(model, data, progress or NoProgress()), "images": len(data.test)}
    if kernel_masks(model):
        found["sparse_latency_ms"] = sparse_latency(model, data.input_shape)
    return found


def open_work(work: Path, identity: dict[str, Any], say: Say, *, force: bool, resume: bool) -> None:
    """Make the folder of checkpoints, or go on with it; of several processes the first does.

    Args:
        work: the folder.
        identity: what an interrupted run and its continuation must have in common.
        say: takes a line of news.
        force: start over if there is an unfinished run.
        resume: go on with it.

    Raises:
        ArtifactError: if there is an unfinished run and neither is given, or it is another one.
    """
    Processes().once(lambda: _open_work(work, identity, say, force=force, resume=resume))


def _open_work(work: Path, identity: dict[str, Any], say: Say, *, force: bool, resume: bool) -> None:
    note, now = work / "job.json", json.loads(json.dumps(identity))  # tuples are lists there
    if note.exists() and resume:
        before = read_json(note)
        different = [key for key in now if before.get(key) != now[key]]
        if different:
            raise ArtifactError(
                f"{work} holds another run ({', '.join(different)} differ); use the same options, or --force"
            )
        say(f"continuing the run in {work}")
        return
    if work.exists():
        if not force:
            raise ArtifactError(
                f"{work} holds an unfinished run; go on with --resume, or start over with --force"
            )
        shutil.rmtree(work)
    work.mkdir(parents=True)
    write_json(note, now)


def _dense(job: PruneJob, model: nn.Module, data: ImageData, progress: Progress, say: Say) -> nn.Module:
    """Train the dense network, unless weights came with it."""
    if job.source.weights is None:
        base = job.training or TrainingConfig(epochs=1)
        config = replace(
            base,
            epochs=job.dense_training(),
            learning_rate=0.1,
            warmup_epochs=0,
            distill=0.0,
            distill_features=0.0,
        )
        say(f"no weights given: training {job.source.model} for {config.epochs} epochs")
        train(
            model,
            data.train,
            None,
            config,
            checkpoint=job.work / "dense",
            resume=job.resume,
            logs=job.logs(job.work / "dense"),
            progress=progress,
        )
    return model


def _timed_plan(
    job: PruneJob,
    number: int,
    model: nn.Module,
    data: ImageData,
    dense: dict[str, Any],
    work: Path,
    progress: Progress,
    say: Say,
) -> tuple[Plan, float | None]:
    """Make the plan of a stage, and say in how many seconds.

    A continued run reads what the interrupted one needed, as its own choice may start from what was measured then.
    None if that one was interrupted while it chose.
    """
    note = work / "scoring.json"
    before = read_json(note) if job.resume and note.exists() else None
    if before is None:
        work.mkdir(parents=True, exist_ok=True)
        write_json(note, {"seconds": None})
    started = time.perf_counter()
    plan = _plan(job, number, model, data, dense, work, progress, say)
    seconds = round(time.perf_counter() - started, 3) if before is None else before["seconds"]
    write_json(note, {"seconds": seconds})
    return plan, seconds


def _plan(
    job: PruneJob,
    number: int,
    model: nn.Module,
    data: ImageData,
    dense: dict[str, Any],
    work: Path,
    progress: Progress,
    say: Say,
) -> Plan:
    if job.plan:
        return Plan.load(job.plan)
    choice = job.stages[number - 1]
    if job.rounds > 1:
        choice = _for_round(job, choice, number, model, data, dense)
    return _choose(job.source, choice, model, data, work, progress=progress, say=say)


def _for_round(
    job: PruneJob, choice: Choice, number: int, model: nn.Module, data: ImageData, dense: dict[str, Any]
) -> Choice:
    """Return the choice with what this round has to reach."""
    goal, amount = choice.goal
    left, things = 1.0, 0
    if goal in ("target_macs", "target_params"):
        macs, params = count(model, (_example(job.source, data),))
        left = macs / dense["macs"] if goal == "target_macs" else params / dense["params"]
    elif goal == "keep_layers":
        things = len(find_branches(model))
    now = amount_in_round(goal, amount, number, job.rounds, left, things)
    changed: dict[str, Any] = {goal: now if goal == "keep_layers" else min(now, 0.999)}
    return replace(choice, **changed)


def _choose(
    source: Source,
    choice: Choice,
    model: nn.Module,
    data: ImageData,
    work: Path | None = None,
    *,
    progress: Progress | None = None,
    say: Say = lambda _: None,
) -> Plan:
    """Make the plan; ``work`` takes what has been measured so far."""
    info, (goal, amount) = choice.info, choice.goal
    limits = {name: getattr(choice, name) for name in ("layers", "min_channels", "round_to", "latency_batch")}
    if info.kind == "selector":
        request = selection_request(
            (_example(source, data),), choice.unit, goal, amount,
            seed=source.seed, work=work, progress=progress or NoProgress(), say=say, **limits,
        )  # fmt: skip
        return info.build_selector(**choice.criterion_options).select(model, data, request)
    if choice.unit == "kernel":
        scores = load_object(info.kernel_scores)(model, (_example(source, data),))
        made_by = {"criterion": choice.criterion, "granularity": "kernel", goal: amount, "seed": source.seed}
        return plan_kernels(model, (_example(source, data),), scores, ratio=amount, made_by=made_by)
    options = {name: getattr(choice, name) for name in (*GOALS, "criterion", "ratio", "allocation")} | limits
    if choice.allocation == "sensitivity":
        options["sensitivity"] = _table(source, choice, model, data, work, progress=progress)
    if choice.analysis.rerank:
        options["rerank"] = choice.analysis.ratios
    return plan_pruning(
        model,
        _example(source, data),
        batches=_calibration(source, choice, data),
        criterion_options=choice.criterion_options,
        seed=source.seed,
        **options,
    )


def _table(
    source: Source, choice: Choice, model: nn.Module, data: ImageData, work: Path | None, **shown: Any
) -> Sensitivity:
    """Read the sensitivity table, or measure it."""
    if choice.table is not None:
        return Sensitivity.load(choice.table)
    analysis, info = choice.analysis, get_criterion(choice.criterion)
    graph = PruningGraph(model, (_example(source, data),))
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
        protocol="test" if analysis.paper_protocol else "validation",
        checkpoint=None if work is None else work / "cells.jsonl",
        resume=True,
        **shown,
    )


def _calibration(source: Source, choice: Choice, data: ImageData) -> list[tuple[Tensor, Tensor]]:
    """Return the images that the criterion looks at, if it looks at any."""
    if not get_criterion(choice.criterion).needs_data:
        return []
    images = data.train.plain().subset(min(choice.calibration_images, len(data.train)), seed=source.seed)
    device = source.find_device()
    return [(x.to(device), y.to(device)) for x, y in images.loader(128)]


def _example(source: Source, data: ImageData) -> Tensor:
    return torch.zeros(1, *data.input_shape, device=source.find_device())


def measure(model: nn.Module, data: ImageData, progress: Progress) -> dict[str, Any]:
    """Return ``top1`` on the test images in percent, ``macs``, ``params`` and ``latency_ms``."""
    example = torch.zeros(1, *data.input_shape, device=next(model.parameters()).device)
    macs, params = count(model, (example,))
    top1 = evaluate(model, data.test, progress=progress).top1
    return {"top1": top1, "macs": macs, "params": params, "latency_ms": latency(model, data.input_shape)}


def _recalibrated(
    job: PruneJob,
    model: nn.Module,
    data: ImageData,
    form: ImageSet,
    pruned: dict[str, Any],
    progress: Progress,
) -> dict[str, Any] | None:
    if not job.recalibrate:
        return None
    recalibrate_batchnorm(model, form)
    top1 = evaluate(model, data.test, progress=progress).top1
    return {**pruned, "top1": top1, "statistics_of": "augmented" if form.augmented else "plain"}


def _finetuned(
    job: PruneJob,
    model: nn.Module,
    teacher: nn.Module | None,
    data: ImageData,
    pruned: dict[str, Any],
    training: TrainingConfig | None,
    checkpoint: Path,
    progress: Progress,
    say: Say,
) -> tuple[dict[str, Any] | None, float | None]:
    """Fine-tune; return the numbers, and the last epoch's top-1 on the validation images, for choices to come."""
    if training is None:
        return None, None
    result = train(
        model,
        data.train,
        data.validation,
        training,
        checkpoint=checkpoint,
        resume=job.resume,
        logs=job.logs(checkpoint),
        teacher=teacher,
        progress=progress,
    )
    say(f"fine-tuned for {len(result.history)} epochs")
    finetuned = {**pruned, "top1": evaluate(model, data.test, progress=progress).top1}
    return finetuned, result.history[-1].validation_top1


def _save(
    job: PruneJob,
    model: nn.Module,
    data: ImageData,
    dense: dict[str, Any],
    stages: list[dict[str, Any]],
    folder: Path,
) -> dict[str, Any]:
    """Save the artifact as it is after these stages; return its metrics."""
    *_, last = stages
    metrics = {"dense": dense, **{key: last[key] for key in ("pruned", "recalibrated", "finetuned")}}
    spent = [stage["scoring_seconds"] for stage in stages]
    metrics["scoring_seconds"] = None if None in spent else round(sum(spent), 3)
    metrics["validation_top1"] = last["validation_top1"]
    if len(job.stages) > 1:
        metrics["stages"] = stages
    if kernel_masks(model):
        metrics["kernels"] = kernel_report(model, data.input_shape)
    plans = [Plan.from_dict(stage["plan"]) for stage in stages]
    removals = [removal for plan in plans for removal in plan.removals]

    def report(partial: Path) -> str:
        for number, plan in enumerate(plans, start=1):
            draw_pictures(plan, partial, "" if len(plans) == 1 else f"_stage_{number}")
        structure, sizes = read_json(partial / "pruned_structure.json"), file_sizes(partial)
        return report_markdown(structure, metrics, sizes=sizes, command=job.command, folder=str(job.out))

    save_pruned(
        model,
        folder,
        architecture=job.source.model,
        model_args=job.source.arguments(data),
        input_shape=data.input_shape,
        plan=last["plan"] if len(stages) == 1 else {"stages": [stage["plan"] for stage in stages]},
        history=[[r.layer, True, list(r.channels)] for r in removals if isinstance(r, ChannelRemoval)],
        criterion=plans[-1].made_by.get("criterion"),
        numbers={
            when: {key: stage[key] for key in ("macs", "params")}
            for when, stage in (("before", dense), ("after", last["pruned"]))
        },
        metrics=metrics,
        report=report,
        force=job.force,
    )
    return metrics
