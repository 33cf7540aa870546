"""Training with synaptic strengths, from a dense network to a kernel-sparse artifact.

The network is written as strengths times unit kernels and trained under an L1 penalty on the strengths; then it
becomes a plain network again, loses the weakest kernels by one threshold, and is retrained under the fixed masks.

Source: *Synaptic Strength For Convolutional Neural Network*, arXiv 1811.02454.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from dscore_plugin.artifact import save_pruned
from dscore_plugin.datasets import ImageData, ImageSet
from dscore_plugin.errors import TrainingError
from dscore_plugin.files import read_json, write_json
from dscore_plugin.integrations.torch_pruning.synaptic import kernel_scores
from dscore_plugin.masking import Masks
from dscore_plugin.plan import Plan
from dscore_plugin.report.kernel_numbers import kernel_report
from dscore_plugin.report.numbers import file_sizes
from dscore_plugin.report.tables import report_markdown
from dscore_plugin.runs import Say, measure, open_work
from dscore_plugin.selection.kernels import plan_kernel_ratios
from dscore_plugin.train_jobs import TrainJob, train_phase
from dscore_plugin.training.evaluation import evaluate, recalibrate_batchnorm
from dscore_plugin.training.history import TrainingResult
from dscore_plugin.training.progress import NoProgress, Progress
from dscore_plugin.training.synaptic import (
    SynapticGoal,
    SynapticRegularizer,
    from_synaptic,
    strengths,
    to_synaptic,
)


def run_synaptic(
    job: TrainJob, progress: Progress | None = None, say: Say = lambda _: None
) -> dict[str, Any]:
    """Train with synaptic strengths, remove kernels, retrain, and save an artifact.

    Args:
        job: what to do; its ``sparsity`` is a :class:`~dscore_plugin.training.synaptic.SynapticGoal`, its
            ``training`` the retraining.
        progress: shows bars.
        say: takes a line of news now and then.

    Returns:
        The content of ``metrics.json``: ``dense`` (after the sparse training), ``pruned``, ``recalibrated`` and
        ``finetuned``, each with ``top1`` in percent, ``macs``, ``params`` (of the tensors, zeros included) and
        ``latency_ms``; ``kernels`` (:func:`~dscore_plugin.report.kernel_numbers.kernel_report`: physical and
        effective); ``sweep``: top-1 on the validation images by ratio, before the retraining.

    Raises:
        DScoreError: on bad input, before any work starts; or if the work fails, with what was finished kept.
    """
    goal = job.sparsity
    if not isinstance(goal, SynapticGoal):
        raise TrainingError(f"expected a SynapticGoal, got {type(goal).__name__}")
    shown = progress or NoProgress()
    job.check()
    data = job.source.load_images()
    model = job.source.build(data)
    example = (torch.zeros(1, *data.input_shape, device=next(model.parameters()).device),)
    to_synaptic(model, example, skip_first=goal.skip_first)
    regularizer = SynapticRegularizer(model, goal.strength, goal.training.weight_decay)
    open_work(job.work, job.identity(), say, force=job.force, resume=job.resume)

    sparse = train_phase(job, model, data, "sparse", goal.training, shown, regularizer)
    trained = {name: strength.detach().abs() for name, strength in strengths(model).items()}
    from_synaptic(model)
    metrics: dict[str, Any] = {"dense": measure(model, data, shown)}
    near_zero = sparse.final.regularizer["sparsity"]
    say(f"trained with strengths: {near_zero:.1%} of them near zero, top-1 {metrics['dense']['top1']:.2f} %")
    plans = plan_strengths(model, example, trained, goal)
    metrics["sweep"] = sweep_ratios(model, plans, data.validation.plain(), shown)
    plan = plans[0]
    plan.save(job.work / "plan.json")
    say(str(plan))
    plan.apply(model, example)
    metrics["pruned"] = measure(model, data, shown)
    recalibrate_batchnorm(model, data.train)
    metrics["recalibrated"] = {**metrics["pruned"], "top1": evaluate(model, data.test, progress=shown).top1}
    retrained = train_phase(job, model, data, "retrain", job.training, shown)
    metrics["finetuned"] = {**metrics["pruned"], "top1": evaluate(model, data.test, progress=shown).top1}
    metrics["kernels"] = kernel_report(model, data.input_shape)
    if PartialState().is_main_process:
        _save(job, model, data, plan, metrics, {"sparsity": sparse, "history": retrained})
        shutil.rmtree(job.work)
        say(f"saved {job.out}; load it with dscore_plugin.load_pruned({str(job.out)!r})")
    return metrics


def plan_strengths(
    model: nn.Module, example_inputs: tuple[Any, ...], trained: Mapping[str, Tensor], goal: SynapticGoal
) -> list[Plan]:
    """Plan for the goal's ratio, and then for those of its sweep: the weakest of the trained strengths leave.

    Args:
        model: the plain network again, left as it is.
        example_inputs: the arguments of one forward pass.
        trained: the magnitudes of the strengths by convolution, from before it became plain; scales of 0 say nothing
            of them any more.
        goal: the ratios.

    Returns:
        The plans.
    """
    ratios = list(dict.fromkeys((goal.ratio, *goal.sweep)))
    made_by = {"criterion": goal.method, "granularity": "kernel", "lambda": goal.strength}
    scores = {**kernel_scores(model, example_inputs), **trained}
    return plan_kernel_ratios(
        model, example_inputs, scores, ratios=ratios, made_by=made_by, skip_first=goal.skip_first
    )


def sweep_ratios(
    model: nn.Module, plans: Sequence[Plan], images: ImageSet, progress: Progress | None = None
) -> dict[str, float]:
    """Evaluate a network under several plans for its kernels, without changing it.

    Args:
        model: the network that the plans were made for.
        plans: as :func:`~dscore_plugin.selection.kernels.plan_kernel_ratios` makes them.
        images: to evaluate on.
        progress: shows bars.

    Returns:
        Top-1 in percent by ratio, written as in ``"0.9"``.
    """
    top1 = {}
    model.eval()
    with Masks(model) as masks:
        for plan in plans:
            places = {removal.layer: torch.tensor(removal.indices) for removal in plan.removals}
            masks.silence((), places)
            top1[f"{plan.made_by['ratio']:g}"] = evaluate(model, images, progress=progress).top1
    return top1


def _save(
    job: TrainJob,
    model: nn.Module,
    data: ImageData,
    plan: Plan,
    metrics: Mapping[str, Any],
    results: Mapping[str, TrainingResult],
) -> None:
    def report(folder: Path) -> str:
        for name, result in results.items():
            write_json(folder / f"{name}.json", result.rows())
        structure = read_json(folder / "pruned_structure.json")
        sizes = file_sizes(folder)
        return report_markdown(
            structure, dict(metrics), sizes=sizes, command=job.command, folder=str(job.out)
        )

    kernels = metrics["kernels"]
    save_pruned(
        model,
        job.out,
        architecture=job.source.model,
        model_args=job.source.arguments(data),
        input_shape=data.input_shape,
        plan=plan.to_dict(),
        criterion="synaptic_strength",
        numbers={
            "before": {key: metrics["dense"][key] for key in ("macs", "params")},
            "after": {key: kernels[key]["effective"] for key in ("macs", "params")},
        },
        metrics=dict(metrics),
        report=report,
        force=job.force,
    )
