"""One pruning run, readable from top to bottom: load, score, select, remove, save, fine-tune, report."""

from __future__ import annotations

import copy
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from dscore_plugin.artifact import load_pruned, save_pruned
from dscore_plugin.choosing import choose, example_of
from dscore_plugin.costs import count
from dscore_plugin.datasets import ImageData, ImageSet
from dscore_plugin.errors import TrainingError
from dscore_plugin.files import read_json, write_json
from dscore_plugin.jobs import Choice, PruneJob, amount_in_round
from dscore_plugin.plan import ChannelRemoval, Plan, fingerprint
from dscore_plugin.report.kernel_numbers import kernel_report
from dscore_plugin.report.numbers import file_sizes
from dscore_plugin.report.pictures import draw_pictures
from dscore_plugin.report.tables import report_markdown
from dscore_plugin.runs import Say, measure, open_work
from dscore_plugin.selection.processes import Processes
from dscore_plugin.surgery.kernel_masks import kernel_masks
from dscore_plugin.surgery.layers import find_branches
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.evaluation import evaluate, images_of_statistics, recalibrate_batchnorm
from dscore_plugin.training.history import TrainingResult
from dscore_plugin.training.loop import train
from dscore_plugin.training.progress import NoProgress, Progress

Numbers = dict[str, Any]


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
    if job.source.weights is None and job.dense_training is not None:
        say(f"no weights given: training {job.source.model} for {job.dense_training.epochs} epochs")
        _train(job, model, data.train, None, job.dense_training, job.work / "dense", progress=shown)
    teacher = copy.deepcopy(model) if job.distils else None
    dense = measure(model, data, shown)
    say(f"dense: top-1 {dense['top1']:.2f} %, {dense['macs'] / 1e6:.1f} M MACs")

    run = _Run(job, data, dense, teacher, shown, say)
    stages = run.finished_stages()
    if stages:
        model = load_pruned(run.folder(len(stages)) / "model").to(job.source.find_device())
    for number in range(len(stages) + 1, len(job.stages) + 1):
        stages.append(run.stage(number, model))
        if number < len(job.stages):
            run.save(model, stages, run.folder(number) / "model")

    metrics = run.save(model, stages, job.out)
    shutil.rmtree(job.work)
    say(f"saved {job.out}; load it with dscore_plugin.load_pruned({str(job.out)!r})")
    return metrics


def _train(
    job: PruneJob,
    model: nn.Module,
    images: ImageSet,
    validation: ImageSet | None,
    config: TrainingConfig,
    checkpoint: Path,
    **options: Any,
) -> TrainingResult:
    """Train where the job computes, and go on from the checkpoint in a continued run."""
    return train(
        model, images, validation, config, checkpoint=checkpoint, resume=job.resume, logs=job.logs(checkpoint),
        device=job.source.training_device(), **options,
    )  # fmt: skip


@dataclass(frozen=True)
class _Run:
    """What stays the same from the first stage to the last.

    Attributes:
        job: what to do.
        data: the images.
        dense: the numbers of the dense network.
        teacher: the dense network, where any training learns from it.
        progress: shows bars.
        say: takes a line of news.
    """

    job: PruneJob
    data: ImageData
    dense: Numbers
    teacher: nn.Module | None
    progress: Progress
    say: Say

    def folder(self, number: int) -> Path:
        """Return the folder that keeps a stage, counted from 1, until the run is over."""
        return self.job.work if len(self.job.stages) == 1 else self.job.work / f"stage-{number}"

    def finished_stages(self) -> list[Numbers]:
        """Read what the stages before the last left behind, as far as an interrupted run came."""
        for number in range(len(self.job.stages) - 1, 0, -1):
            folder = self.folder(number) / "model"
            if folder.exists():
                return list(read_json(folder / "metrics.json")["stages"])
        return []

    def stage(self, number: int, model: nn.Module) -> Numbers:
        """Choose, remove, measure, recalibrate, fine-tune; return the stage's plan and numbers."""
        form = images_of_statistics(model, self.data.train) if self.job.recalibrate else None
        plan, seconds = self._timed_plan(number, model)
        plan.save(self.folder(number) / "plan.json")
        self.say(str(plan))
        plan.apply(model)
        pruned = measure(model, self.data, self.progress)
        recalibrated = self._recalibrated(model, form, pruned) if form is not None else None
        finetuned, validation = self._finetuned(number, model, pruned)
        return {
            "plan": plan.to_dict(),
            "pruned": pruned,
            "scoring_seconds": seconds,
            "recalibrated": recalibrated,
            "finetuned": finetuned,
            "validation_top1": validation,
        }

    def save(self, model: nn.Module, stages: list[Numbers], folder: Path) -> Numbers:
        """Save the artifact as it is after these stages; return its metrics."""
        *_, last = stages
        metrics = self._metrics(model, stages)
        plans = [Plan.from_dict(stage["plan"]) for stage in stages]
        removals = [removal for plan in plans for removal in plan.removals]

        def report(partial: Path) -> str:
            for number, plan in enumerate(plans, start=1):
                draw_pictures(plan, partial, "" if len(plans) == 1 else f"_stage_{number}")
            structure, sizes = read_json(partial / "pruned_structure.json"), file_sizes(partial)
            return report_markdown(
                structure, metrics, sizes=sizes, command=self.job.command, folder=str(self.job.out)
            )

        save_pruned(
            model,
            folder,
            architecture=self.job.source.model,
            model_args=self.job.source.arguments(self.data),
            input_shape=self.data.input_shape,
            plan=last["plan"] if len(stages) == 1 else {"stages": [stage["plan"] for stage in stages]},
            history=[[r.layer, True, list(r.channels)] for r in removals if isinstance(r, ChannelRemoval)],
            criterion=plans[-1].made_by.get("criterion"),
            numbers={
                when: {key: stage[key] for key in ("macs", "params")}
                for when, stage in (("before", self.dense), ("after", last["pruned"]))
            },
            metrics=metrics,
            report=report,
            force=self.job.force,
        )
        return metrics

    def _timed_plan(self, number: int, model: nn.Module) -> tuple[Plan, float | None]:
        """Make the plan of a stage, and say in how many seconds.

        A continued run takes the plan of the interrupted one, as measured latencies would make another, unless the
        criterion changes weights: then it chooses again, from what was measured. Either way it reads how many seconds
        the interrupted one needed; None if that one was interrupted while it chose.
        """
        note = self.folder(number) / "scoring.json"
        before = read_json(note) if self.job.resume and note.exists() else None
        if before is None:
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, {"seconds": None})
        started = time.perf_counter()
        plan = self._earlier_plan(number, model) or self._plan(number, model)
        seconds = round(time.perf_counter() - started, 3) if before is None else before["seconds"]
        write_json(note, {"seconds": seconds})
        return plan, seconds

    def _earlier_plan(self, number: int, model: nn.Module) -> Plan | None:
        file = self.folder(number) / "plan.json"
        plan = Plan.load(file) if self.job.resume and file.exists() else None
        return plan if plan and plan.fingerprint == fingerprint(model) else None

    def _plan(self, number: int, model: nn.Module) -> Plan:
        if self.job.plan:
            return Plan.load(self.job.plan)
        choice = self.job.stages[number - 1]
        if self.job.rounds > 1:
            choice = self._for_round(choice, number, model)
        return choose(
            self.job.source,
            choice,
            model,
            self.data,
            self.folder(number),
            progress=self.progress,
            say=self.say,
        )

    def _for_round(self, choice: Choice, number: int, model: nn.Module) -> Choice:
        """Return the choice with what this round has to reach."""
        goal, amount = choice.goal
        asked, left, things = goal, 1.0, 0
        if goal in ("target_macs", "target_params"):
            macs, params = count(model, (example_of(self.job.source, self.data),))
            left = macs / self.dense["macs"] if goal == "target_macs" else params / self.dense["params"]
        elif goal == "keep_layers":
            things = len(find_branches(model))
        elif choice.unit == "kernel" and choice.info.kind != "selector":
            asked = "cumulative_ratio"  # plan_kernels counts what is gone
        now = amount_in_round(asked, amount, number, self.job.rounds, left, things)
        changed: dict[str, Any] = {goal: now if goal == "keep_layers" else min(now, 0.999)}
        return replace(choice, **changed)

    def _recalibrated(self, model: nn.Module, form: ImageSet, pruned: Numbers) -> Numbers:
        recalibrate_batchnorm(model, form)
        top1 = evaluate(model, self.data.test, progress=self.progress).top1
        return {**pruned, "top1": top1, "statistics_of": "augmented" if form.augmented else "plain"}

    def _finetuned(
        self, number: int, model: nn.Module, pruned: Numbers
    ) -> tuple[Numbers | None, float | None]:
        """Fine-tune; return the numbers, and the last epoch's top-1 on the validation images, for choices to come."""
        data, training = self.data, self.job.training_after(number)
        if training is None:
            return None, None
        result = _train(
            self.job, model, data.train, data.validation, training, self.folder(number) / "finetune",
            teacher=self.teacher if training.distils else None, progress=self.progress,
        )  # fmt: skip
        self.say(f"fine-tuned for {len(result.history)} epochs")
        finetuned = {**pruned, "top1": evaluate(model, data.test, progress=self.progress).top1}
        return finetuned, result.history[-1].validation_top1

    def _metrics(self, model: nn.Module, stages: list[Numbers]) -> Numbers:
        *_, last = stages
        metrics = {"dense": self.dense, **{key: last[key] for key in ("pruned", "recalibrated", "finetuned")}}
        spent = [stage["scoring_seconds"] for stage in stages]
        metrics["scoring_seconds"] = None if None in spent else round(sum(spent), 3)
        metrics["validation_top1"] = last["validation_top1"]
        if len(self.job.stages) > 1:
            metrics["stages"] = stages
        if kernel_masks(model):
            metrics["kernels"] = kernel_report(model, self.data.input_shape)
        return metrics
