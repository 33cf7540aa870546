"""One pruning run, readable from top to bottom: load, score, select, remove, save, fine-tune, report."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from dscore_plugin.artifact import load_pruned, read_structure, save_pruned
from dscore_plugin.datasets import ImageData, ImageSet, load_data
from dscore_plugin.errors import ArtifactError, BudgetError, ModelError
from dscore_plugin.files import atomic_folder, ensure_writable, read_json, write_json
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.plan import Plan
from dscore_plugin.planning import GOALS, check_goals, plan_pruning, rerank_groups, score_groups
from dscore_plugin.registry import get_criterion
from dscore_plugin.report.numbers import count, file_sizes, latency
from dscore_plugin.report.plots import plot_sensitivity
from dscore_plugin.report.tables import report_markdown
from dscore_plugin.selection.sensitivity import RATIOS, Sensitivity, check_ratios, sensitivity_analysis
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.evaluation import evaluate, recalibrate_batchnorm
from dscore_plugin.training.loop import train
from dscore_plugin.training.progress import NoProgress, Progress

Say = Callable[[str], None]
DENSE_EPOCHS = {"digits": 20}  # data small enough that a dense network is trained on the spot


@dataclass(frozen=True)
class Source:
    """Which network, which weights, which images.

    Attributes:
        model: a name in timm's registry, ours included.
        data: as in :func:`dscore_plugin.datasets.load_data`.
        weights: a safetensors file of the dense network.
        model_args: further arguments of the model.
        image_size: for image folders.
        seed: of the validation split, the training and everything random.
        device: ``"auto"`` takes a GPU where there is one.
    """

    model: str = "digits_cnn"
    data: str = "digits"
    weights: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    seed: int = 0
    device: str = "auto"

    def load_images(self) -> ImageData:
        """Load the images; raise DataError if they are not there."""
        return load_data(self.data, seed=self.seed, image_size=self.image_size)

    def build(self, data: ImageData) -> nn.Module:
        """Build the network for ``data`` and load its weights, if any are named; raise ModelError if they misfit."""
        torch.manual_seed(self.seed)
        model = create_model(
            self.model, num_classes=data.num_classes, in_chans=data.input_shape[0], **self.model_args
        )
        if self.weights:
            load_weights(model, Path(self.weights))
        return model.to(self.find_device())

    def find_device(self) -> torch.device:
        """Return the device to compute on."""
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Analysis:
    """How the sensitivity of the layers is measured.

    Attributes:
        images: of the validation split; None takes all.
        ratios: shares of a layer's channels to remove.
        paper_protocol: measure on the test images, as the paper did. The choice of ratios then knows them.
        early_exit: give a layer up once it lies so many points below the dense accuracy; None measures all.
        fold_batchnorm: fold batch norm into the convolutions, for speed; the numbers differ by rounding.
        rerank: score what is left of a layer anew after every step, as the paper's code does.
    """

    images: int | None = 2000
    ratios: tuple[float, ...] = RATIOS
    paper_protocol: bool = False
    early_exit: float | None = None
    fold_batchnorm: bool = False
    rerank: bool = False

    def choose_images(self, data: ImageData, seed: int) -> ImageSet:
        """Return the images to measure on; raise DataError if there are none."""
        images = data.test if self.paper_protocol else data.validation.plain()
        return images if self.images is None else images.subset(min(self.images, len(images)), seed=seed)


@dataclass(frozen=True)
class Choice:
    """How the channels are chosen.

    Attributes:
        calibration_images: for criteria that look at data.
        table: a sensitivity table measured before, for the allocation by sensitivity; None measures one.
        analysis: how it is measured.

    The other fields are those of :func:`dscore_plugin.planning.plan_pruning`.
    """

    criterion: str = "d_score"
    ratio: float | None = None
    target_macs: float | None = None
    target_params: float | None = None
    target_latency: float | None = None
    threshold: float | None = None
    max_drop: float | None = None
    allocation: str = "uniform"
    layers: str = "all"
    min_channels: int = 1
    round_to: int | None = None
    latency_batch: int = 1
    calibration_images: int = 1024
    table: str | None = None
    analysis: Analysis = field(default_factory=Analysis)

    def check(self) -> None:
        """Refuse what can be refused without a model; raise a DScoreError."""
        get_criterion(self.criterion)
        check_goals({name: getattr(self, name) for name in ("ratio", *GOALS)}, self.allocation)
        if self.table is not None:
            Sensitivity.load(self.table)
        check_ratios(self.analysis.ratios)


@dataclass(frozen=True)
class PruneJob:
    """Everything that ``dscore prune`` is asked to do.

    Attributes:
        source: network, weights, images.
        choice: criterion, budget, allocation.
        out: the folder of the artifact.
        plan: a plan to apply, instead of choosing.
        training: of the fine-tuning; None leaves it out.
        dense_epochs: epochs of training the dense network where there are no weights.
        recalibrate: whether batch norm's statistics are measured again after the removal.
        force: replace an existing artifact.
        resume: go on with an interrupted run.
        command: the command line, for the report.
    """

    source: Source
    choice: Choice
    out: Path
    plan: Path | None = None
    training: TrainingConfig | None = None
    dense_epochs: int | None = None
    recalibrate: bool = True
    force: bool = False
    resume: bool = False
    command: str = ""

    @property
    def work(self) -> Path:
        """Where checkpoints lie until the artifact is complete."""
        return self.out.with_name(self.out.name + ".work")

    def identity(self) -> dict[str, Any]:
        """What an interrupted run and its continuation must have in common."""
        content = asdict(self)
        for key in ("force", "resume", "command", "out"):
            del content[key]
        return {**content, "plan": str(self.plan) if self.plan else None}


def run_prune(job: PruneJob, progress: Progress | None = None, say: Say = lambda _: None) -> dict[str, Any]:
    """Prune a network end to end and save the artifact.

    Args:
        job: what to do.
        progress: shows bars.
        say: takes a line of news now and then.

    Returns:
        The content of ``metrics.json``: ``dense``, ``pruned``, ``recalibrated`` and ``finetuned``, each with
        ``top1`` in percent, ``macs``, ``params`` and ``latency_ms``, or None where it was not run.

    Raises:
        DScoreError: on bad input, before any work starts; or if the work fails, with what was finished kept.
    """
    shown = progress or NoProgress()
    _check(job)
    data = job.source.load_images()
    model = job.source.build(data)
    open_work(job.work, job.identity(), say, force=job.force, resume=job.resume)

    model = _dense(job, model, data, shown, say)
    metrics: dict[str, Any] = {"dense": measure(model, data, shown)}
    say(f"dense: top-1 {metrics['dense']['top1']:.2f} %, {metrics['dense']['macs'] / 1e6:.1f} M MACs")

    plan = _plan(job, model, data, shown)
    plan.save(job.work / "plan.json")
    say(str(plan))
    plan.apply(model)
    metrics["pruned"] = measure(model, data, shown)
    metrics["recalibrated"] = _recalibrated(job, model, data, metrics["pruned"], shown)
    metrics["finetuned"] = _finetuned(job, model, data, metrics["pruned"], shown, say)

    _save(job, model, data, plan, metrics)
    shutil.rmtree(job.work)
    say(f"saved {job.out}; load it with dscore_plugin.load_pruned({str(job.out)!r})")
    return metrics


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
        ``{"top1", "images", "macs", "params", "latency_ms"}``.

    Raises:
        DScoreError: on bad input.
    """
    if folder is None and source.weights is None:
        raise ModelError("a dense network needs trained weights; pass --weights FILE, or name an artifact")
    if folder is not None:
        read_structure(folder)  # before the images, which may take long to load
    data = source.load_images()
    model = source.build(data) if folder is None else load_pruned(folder).to(source.find_device())
    return {**measure(model, data, progress or NoProgress()), "images": len(data.test)}


def _check(job: PruneJob) -> None:
    """Refuse what can be refused before any work starts."""
    ensure_writable(job.out, job.force)
    if job.plan is not None:
        Plan.load(job.plan)
    else:
        job.choice.check()
    if job.source.weights is None and _dense_epochs(job) < 1:
        raise ModelError(
            f"{job.source.model} has no weights; pass --weights FILE, or --dense-epochs N to train it first"
        )


def open_work(work: Path, identity: dict[str, Any], say: Say, *, force: bool, resume: bool) -> None:
    """Make the folder of checkpoints, or go on with it.

    Args:
        work: the folder.
        identity: what an interrupted run and its continuation must have in common.
        say: takes a line of news.
        force: start over if there is an unfinished run.
        resume: go on with it.

    Raises:
        ArtifactError: if there is an unfinished run and neither is given, or it is another one.
    """
    note, now = work / "job.json", _plain(identity)
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


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """Turn tuples into lists, as JSON does, so that two jobs can be compared."""
    return {
        key: _plain(value) if isinstance(value, dict) else list(value) if isinstance(value, tuple) else value
        for key, value in content.items()
    }


def _dense_epochs(job: PruneJob) -> int:
    return DENSE_EPOCHS.get(job.source.data, 0) if job.dense_epochs is None else job.dense_epochs


def _dense(job: PruneJob, model: nn.Module, data: ImageData, progress: Progress, say: Say) -> nn.Module:
    """Train the dense network, unless weights came with it."""
    if job.source.weights is None:
        base = job.training or TrainingConfig(epochs=1)
        config = replace(base, epochs=_dense_epochs(job), learning_rate=0.1, warmup_epochs=0)
        say(f"no weights given: training {job.source.model} for {config.epochs} epochs")
        train(
            model,
            data.train,
            None,
            config,
            checkpoint=job.work / "dense",
            resume=job.resume,
            progress=progress,
        )
    return model


def _plan(job: PruneJob, model: nn.Module, data: ImageData, progress: Progress) -> Plan:
    if job.plan:
        return Plan.load(job.plan)
    return _choose(job.source, job.choice, model, data, job.work, progress=progress)


def _choose(
    source: Source, choice: Choice, model: nn.Module, data: ImageData, work: Path | None = None, **shown: Any
) -> Plan:
    """Make the plan; ``work`` takes what a sensitivity analysis has measured so far."""
    options = {name: getattr(choice, name) for name in (*GOALS, "criterion", "ratio", "allocation", "layers")}
    options |= {name: getattr(choice, name) for name in ("min_channels", "round_to", "latency_batch")}
    if choice.allocation == "sensitivity":
        options["sensitivity"] = _table(source, choice, model, data, work, **shown)
    if choice.analysis.rerank:
        options["rerank"] = choice.analysis.ratios
    batches = _calibration(source, choice, data)
    return plan_pruning(model, _example(source, data), batches=batches, seed=source.seed, **options)


def _table(
    source: Source, choice: Choice, model: nn.Module, data: ImageData, work: Path | None, **shown: Any
) -> Sensitivity:
    """Read the sensitivity table, or measure it."""
    if choice.table is not None:
        return Sensitivity.load(choice.table)
    analysis, info = choice.analysis, get_criterion(choice.criterion)
    graph = PruningGraph(model, (_example(source, data),))
    batches = _calibration(source, choice, data)
    scored = score_groups(graph, info, layers=choice.layers, batches=batches, seed=source.seed)
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
    job: PruneJob, model: nn.Module, data: ImageData, pruned: dict[str, Any], progress: Progress
) -> dict[str, Any] | None:
    if not job.recalibrate:
        return None
    recalibrate_batchnorm(model, data.train.plain())
    return {**pruned, "top1": evaluate(model, data.test, progress=progress).top1}


def _finetuned(
    job: PruneJob, model: nn.Module, data: ImageData, pruned: dict[str, Any], progress: Progress, say: Say
) -> dict[str, Any] | None:
    if job.training is None:
        return None
    checkpoint = job.work / "finetune"
    result = train(
        model,
        data.train,
        data.validation,
        job.training,
        checkpoint=checkpoint,
        resume=job.resume,
        progress=progress,
    )
    say(f"fine-tuned for {len(result.history)} epochs")
    return {**pruned, "top1": evaluate(model, data.test, progress=progress).top1}


def _save(job: PruneJob, model: nn.Module, data: ImageData, plan: Plan, metrics: dict[str, Any]) -> None:
    stages = {"before": metrics["dense"], "after": metrics["pruned"]}
    save_pruned(
        model,
        job.out,
        architecture=job.source.model,
        model_args={
            "num_classes": data.num_classes,
            "in_chans": data.input_shape[0],
            **job.source.model_args,
        },
        input_shape=data.input_shape,
        plan=plan.to_dict(),
        history=[[r.layer, True, list(r.channels)] for r in plan.removals],
        criterion=plan.made_by.get("criterion"),
        numbers={when: {key: stage[key] for key in ("macs", "params")} for when, stage in stages.items()},
        metrics=metrics,
        report=lambda folder: report_markdown(
            read_json(folder / "pruned_structure.json"),
            metrics,
            sizes=file_sizes(folder),
            command=job.command,
            folder=str(job.out),
        ),
        force=job.force,
    )


def default_out(model: str, criterion: str) -> Path:
    """Return where an artifact goes if nobody says."""
    return Path("runs") / f"{model}-{criterion}"


def require_one(folder: Path | None, model: str | None) -> None:
    """Refuse an evaluation of nothing, or of two things at once."""
    if (folder is None) == (model is None):
        raise BudgetError("name either an artifact's folder or --model with --weights")
