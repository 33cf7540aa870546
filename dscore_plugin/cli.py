"""The command line: parses, calls the pipeline, prints. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from dscore_plugin.cli_options import (
    ANALYSIS,
    CRITERION,
    GOAL,
    GOAL_NAMES,
    SEARCH,
    SOURCE,
    TRAINING,
    Data,
    Force,
    Json,
    Resume,
    Seed,
    numbers,
    read_choice,
    read_source,
    read_training,
    require_unused,
    whole_numbers,
    with_options,
)
from dscore_plugin.errors import DScoreError
from dscore_plugin.registry import list_criteria

app = typer.Typer(
    help="Prune networks with paper-faithful criteria.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
_errors = Console(stderr=True, soft_wrap=True, highlight=False)

_PRUNE_HELP = """Prune a network, fine-tune it, save it with a report.

Without arguments: a small CNN on scikit-learn's digits, trained first, in under two minutes.

Examples:

`dscore prune`

`dscore prune --model cifar_resnet56 --weights resnet56.safetensors --data cifar10:PATH --criterion d_score
--target-macs 0.5 --epochs 2 --out runs/r56`
"""


@app.command(help=_PRUNE_HELP)
@with_options(SOURCE, CRITERION, GOAL, SEARCH, ANALYSIS, TRAINING)
def prune(
    context: typer.Context,
    plan: Annotated[
        Path | None, typer.Option(help="Apply this plan instead of choosing.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Approach the goal in so many steps.")] = 1,
    feature_map_ratio: Annotated[
        float | None,
        typer.Option(
            metavar="R", help="coarse: share of the feature maps to remove, first.", show_default=False
        ),
    ] = None,
    kernel_ratio: Annotated[
        float | None,
        typer.Option(metavar="R", help="coarse: share of the kernels to remove, then.", show_default=False),
    ] = None,
    epochs: Annotated[int, typer.Option(min=0, help="Of fine-tuning; 0 leaves it out.")] = 10,
    round_epochs: Annotated[
        int | None,
        typer.Option(
            min=0, help="Of fine-tuning after every step but the last; default: --epochs.", show_default=False
        ),
    ] = None,
    dense_epochs: Annotated[
        int | None,
        typer.Option(min=0, help="Of training the dense network, without weights.", show_default=False),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", help="Of fine-tuning, at its peak.")
    ] = 0.02,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    weight_decay: Annotated[float, typer.Option()] = 5e-4,
    schedule: Annotated[str, typer.Option(help="cosine, steps or constant.")] = "cosine",
    milestones: Annotated[
        str | None, typer.Option(metavar="E,E,...", help="Epochs of --schedule steps.", show_default=False)
    ] = None,
    label_smoothing: Annotated[float, typer.Option()] = 0.0,
    distill: Annotated[
        float, typer.Option(metavar="W", help="Learn from the dense network: share of its soft targets.")
    ] = 0.0,
    distill_temperature: Annotated[float, typer.Option(metavar="T", help="Of the soft targets.")] = 4.0,
    distill_features: Annotated[
        float, typer.Option(metavar="W", help="Weight of the dense network's attention maps.")
    ] = 0.0,
    precision: Annotated[str, typer.Option(help="Of training: auto, float32 or bfloat16.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 0,
    no_recalibrate: Annotated[
        bool, typer.Option("--no-recalibrate", help="Leave batch norm's statistics as they are.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the artifact; default runs/MODEL-CRITERION.", show_default=False),
    ] = None,
    force: Force = False,
    resume: Resume = False,
    json_: Json = False,
    **options: Any,
) -> None:
    """Prune a network, fine-tune it, save it with a report."""
    from dscore_plugin.jobs import DENSE_EPOCHS, PruneJob, default_out
    from dscore_plugin.pipeline import run_prune
    from dscore_plugin.plan import Plan
    from dscore_plugin.report.tables import print_metrics
    from dscore_plugin.training.config import TrainingConfig
    from dscore_plugin.training.progress import RichProgress

    if plan is not None:
        ignored = {*CRITERION, *GOAL, *SEARCH, *ANALYSIS, "feature_map_ratio", "kernel_ratio"}
        require_unused(context, ignored, "the plan says what leaves; leave it out, or leave --plan out")
    stages = {"channel": feature_map_ratio, "kernel": kernel_ratio}
    goals = [options[name] for name in GOAL_NAMES]
    choice = read_choice(options)
    if all(goal is None for goal in (*goals, *stages.values())) and not choice.info.stops_by_itself:
        choice = replace(choice, target_macs=0.5)
    criterion = choice.criterion if plan is None else Plan.load(plan).made_by.get("criterion", "plan")
    common: dict[str, Any] = {"schedule": schedule, "precision": precision, **read_training(options)}
    common |= {"batch_size": batch_size, "weight_decay": weight_decay, "label_smoothing": label_smoothing}
    common |= {"workers": workers, "seed": options["seed"]}
    common["milestones"] = whole_numbers("--milestones", milestones)
    distillation: dict[str, Any] = {"distill": distill, "distill_temperature": distill_temperature}
    distillation["distill_features"] = distill_features

    def training(epochs: int) -> TrainingConfig | None:
        return TrainingConfig(epochs, learning_rate, **common, **distillation) if epochs else None

    if dense_epochs is None:
        dense_epochs = DENSE_EPOCHS.get(options["data"], 0)
    dense = TrainingConfig(dense_epochs, 0.1, **common) if dense_epochs and not options["weights"] else None
    job = PruneJob(
        read_source(options),
        choice.in_stages(stages),
        out or default_out(options["model"], criterion),
        rounds=rounds,
        plan=plan,
        training=training(epochs),
        round_training=training(epochs if round_epochs is None else round_epochs),
        dense_training=dense,
        recalibrate=not no_recalibrate,
        force=force,
        resume=resume,
        command=shlex.join(["dscore", *sys.argv[1:]]),
    )
    if len(job.stages) == 1:
        require_unused(
            context, {"round_epochs"}, "there is one step, with --epochs; give --rounds, or leave it out"
        )
    metrics = run_prune(job, RichProgress(), _say)
    if json_:
        _print_json({"folder": str(job.out), **metrics})
    else:
        print_metrics(metrics, title=f"{options['model']}, {criterion}", console=Console())


_EVALUATE_HELP = """Measure an artifact, or a dense network, on the test images.

Examples:

`dscore evaluate runs/r56 --data cifar10:PATH`

`dscore evaluate --model cifar_resnet56 --weights resnet56.safetensors --data cifar10:PATH`
"""


@app.command(help=_EVALUATE_HELP)
@with_options({name: option for name, option in SOURCE.items() if name != "model"})
def evaluate(
    folder: Annotated[Path | None, typer.Argument(help="An artifact.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="A dense network instead.", show_default=False)] = None,
    json_: Json = False,
    **options: Any,
) -> None:
    """Measure an artifact, or a dense network, on the test images."""
    from dscore_plugin.analysis_runs import run_evaluate
    from dscore_plugin.jobs import require_one
    from dscore_plugin.training.progress import RichProgress

    require_one(folder, model)
    found = run_evaluate(folder, read_source({**options, "model": model or ""}), RichProgress())
    if json_:
        _print_json(found)
        return
    table = Table(title=str(folder or model))
    for heading in ("top-1", "images", "MACs", "parameters", "latency, batch 1", "latency, batch 64"):
        table.add_column(heading, justify="right")
    milliseconds = [f"{entry['median']:.2f} ms" for entry in found["latency_ms"].values()]
    table.add_row(
        f"{found['top1']:.2f} %", f"{found['images']:,}", f"{found['macs'] / 1e6:.2f} M",
        f"{found['params']:,}", *milliseconds,
    )  # fmt: skip
    Console().print(table)
    for batch, entry in found.get("sparse_latency_ms", {}).items():
        Console().print(
            f"batch {batch}: {entry['sparse']:.2f} ms on the fastest backends, {entry['dense']:.2f} ms dense"
        )


_PLAN_HELP = """Choose what leaves a network, and write it down as a plan one can read and edit.

Example:

`dscore plan --model cifar_resnet56 --weights resnet56.safetensors --data cifar10:PATH --target-macs 0.5
--out plan.json`
"""


@app.command(help=_PLAN_HELP)
@with_options(SOURCE, CRITERION, GOAL, SEARCH, ANALYSIS)
def plan(
    out: Annotated[Path, typer.Option(help="The plan's file.")],
    force: Force = False,
    json_: Json = False,
    **options: Any,
) -> None:
    """Choose what leaves a network, and write it down."""
    from dscore_plugin.analysis_runs import run_plan
    from dscore_plugin.errors import PlanError

    if out.exists() and not force:
        raise PlanError(f"{out} exists already; choose another file, or replace it with --force")
    chosen = run_plan(read_source(options), read_choice(options), _say)
    chosen.save(out)
    if json_:
        _print_json(chosen.to_dict())
    else:
        typer.echo(str(chosen))


_SENSITIVITY_HELP = """Measure the accuracy of a network with each layer pruned alone, at many ratios.

Writes sensitivity.json, .csv, .png and .svg. Under `accelerate launch` the processes divide the work.

Examples:

`dscore sensitivity --model cifar_resnet56 --weights resnet56.safetensors --data cifar10:PATH --out runs/s56`

`dscore prune ... --allocation sensitivity --sensitivity runs/s56/sensitivity.json --max-drop 2`
"""


@app.command(help=_SENSITIVITY_HELP)
@with_options(SOURCE, CRITERION, ANALYSIS)
def sensitivity(
    out: Annotated[Path, typer.Option(help="The folder of the table and its picture.")],
    force: Force = False,
    resume: Resume = False,
    json_: Json = False,
    **options: Any,
) -> None:
    """Measure the accuracy of a network with each layer pruned alone."""
    from dscore_plugin.analysis_runs import run_sensitivity
    from dscore_plugin.training.progress import RichProgress

    measured = run_sensitivity(
        read_source(options),
        read_choice(options),
        out,
        force=force,
        resume=resume,
        progress=RichProgress(),
        say=_say,
    )
    if json_:
        _print_json(measured.to_dict())
        return
    table = Table(
        title=f"top-1 on {measured.images} {measured.protocol} images; dense {measured.dense_top1:.2f} %"
    )
    shown = measured.ratios[:: max(1, len(measured.ratios) // 9)]
    for heading in ("layer", *(f"{ratio:.0%}" for ratio in shown)):
        table.add_column(heading, justify="left" if heading == "layer" else "right", no_wrap=True)
    for layer in measured.layers:
        cells = dict(zip(measured.ratios, measured.curve(layer), strict=True))
        table.add_row(layer, *("-" if cells[ratio] is None else f"{cells[ratio]:.1f}" for ratio in shown))
    Console().print(table)


# Options of dscore train that only one method has.
_SPARSITY_OPTIONS = {
    "dependency_aware": {"target", "delta", "min_channels"},
    "synaptic_strength": {"ratio", "lambda_", "sweep"},
}
_TRAIN_HELP = """Train a network: dense, or towards sparsity, then prune it and train it again.

Examples:

`dscore train --model cifar_vgg16_bn --data cifar10:PATH --epochs 60 --lr 0.1 --out runs/vgg16`

`dscore train --model cifar_preresnet56 --data cifar10:PATH --sparsity dependency_aware --target 0.5 --epochs 160
--out runs/sparse`

`dscore train --model cifar_vgg16_bn --data cifar10:PATH --sparsity synaptic_strength --lambda 1e-4 --ratio 0.96
--out runs/kernels`
"""


@app.command(help=_TRAIN_HELP)
@with_options(SOURCE, TRAINING)
def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="The folder of the result.")],
    sparsity: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="dependency_aware or synaptic_strength; default: dense.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        float, typer.Option(help="dependency_aware: share of the scored channels to remove.")
    ] = 0.5,
    delta: Annotated[
        float | None, typer.Option(help="Step of lambda; default: the paper's, scaled.", show_default=False)
    ] = None,
    min_channels: Annotated[int, typer.Option(min=1, help="Channels that every layer keeps at least.")] = 8,
    ratio: Annotated[float, typer.Option(help="synaptic_strength: share of the kernels to remove.")] = 0.9,
    lambda_: Annotated[
        float, typer.Option("--lambda", help="synaptic_strength: weight of the penalty; 1e-4 for VGG.")
    ] = 1e-5,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="R,R,...", help="synaptic_strength: other ratios to evaluate.", show_default=False
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the training; default 160, with synaptic_strength 240.", show_default=False
        ),
    ] = None,
    retrain_epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the retraining; default --epochs, with synaptic_strength 50.", show_default=False
        ),
    ] = None,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", help="At its peak.")] = 0.1,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Default 128; 64 with dependency_aware.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default 5e-4; 1e-4 with --sparsity.")] = None,
    label_smoothing: Annotated[float, typer.Option()] = 0.0,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 0,
    force: Force = False,
    resume: Resume = False,
    json_: Json = False,
    **options: Any,
) -> None:
    """Train a network."""
    from dscore_plugin.report.tables import print_metrics
    from dscore_plugin.sparse_training import paper_schedule
    from dscore_plugin.train_jobs import SparsityGoal, TrainJob, unknown_method
    from dscore_plugin.training.config import TrainingConfig
    from dscore_plugin.training.progress import RichProgress
    from dscore_plugin.training.synaptic import SynapticGoal, synaptic_schedule
    from dscore_plugin.training_runs import run_train

    if sparsity is not None and sparsity not in _SPARSITY_OPTIONS:
        raise unknown_method(sparsity)
    for method, names in _SPARSITY_OPTIONS.items():
        if method != sparsity:
            require_unused(context, names, f"it belongs to --sparsity {method}; give that, or leave it out")
    if sparsity is None:
        require_unused(context, {"retrain_epochs"}, "it belongs to --sparsity; give that, or leave it out")
    given = {"batch_size": batch_size, "weight_decay": weight_decay}
    config: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    config |= {"learning_rate": learning_rate, "label_smoothing": label_smoothing, "precision": precision}
    config |= {"workers": workers, "seed": options["seed"], **read_training(options)}
    goal: SparsityGoal | SynapticGoal | None = None
    if sparsity is None:
        training = TrainingConfig(epochs or 160, **config)
    elif sparsity == "dependency_aware":
        sparse, training = paper_schedule(epochs or 160, retrain_epochs, **config)
        sparse = replace(sparse, ema=0.0)  # the penalty acts on the weights themselves, not on their average
        goal = SparsityGoal(target, sparse, sparsity, delta, min_channels=min_channels)
    else:
        sparse, training = synaptic_schedule(epochs or 240, retrain_epochs or 50, **config)
        sparse = replace(sparse, ema=0.0)
        goal = SynapticGoal(ratio, sparse, lambda_, numbers("--sweep", sweep))
    job = TrainJob(
        read_source(options),
        training,
        out,
        sparsity=goal,
        force=force,
        resume=resume,
        command=shlex.join(["dscore", *sys.argv[1:]]),
    )
    metrics = run_train(job, RichProgress(), _say)
    if json_:
        _print_json({"folder": str(out), **metrics})
    else:
        print_metrics(metrics, title=f"{options['model']}, {sparsity or 'dense'}", console=Console())


_BENCH_HELP = """Measure a benchmark of criteria, cell by cell; what is finished is not measured again.

A protocol says what to run (benchmarks/criteria/*.json, docs/benchmark.md). Run the same command again after an
interruption.

Examples:

`dscore bench benchmarks/criteria/resnet20.json --data cifar10:PATH --weights resnet20.safetensors`

`dscore bench benchmarks/criteria/resnet20.json ... --list`

`dscore bench --table benchmarks/results/criteria_resnet20.json --plot docs/images`
"""


@app.command(help=_BENCH_HELP)
def bench(
    protocol: Annotated[Path | None, typer.Argument(help="A protocol.", show_default=False)] = None,
    data: Data = "cifar10",
    weights: Annotated[
        Path | None, typer.Option(help="Safetensors weights of the dense network.", show_default=False)
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder of runs; default runs/bench/NAME.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Results; default benchmarks/results/criteria_NAME.json.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    only: Annotated[
        str | None, typer.Option(metavar="CRITERION,...", help="These rows only.", show_default=False)
    ] = None,
    redo: Annotated[bool, typer.Option("--redo", help="Measure finished cells again.")] = False,
    latency: Annotated[
        bool,
        typer.Option("--latency", help="Measure the latencies of finished cells again, alone; run no cell."),
    ] = False,
    list_cells: Annotated[bool, typer.Option("--list", help="Show the cells and how they stand.")] = False,
    table: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Print these results as Markdown; measure nothing.", show_default=False
        ),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(metavar="PAGE", help="Write the tables between a page's markers.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Draw the results there.", show_default=False)
    ] = None,
    json_: Json = False,
) -> None:
    """Measure a benchmark of criteria."""
    from dscore_plugin.bench.command import BenchRequest, run_request
    from dscore_plugin.training.progress import RichProgress

    request = BenchRequest(
        protocol, data, weights, work, out, device, tuple(only.split(",")) if only else (), redo,
        latency, list_cells, table, into, plot,
    )  # fmt: skip
    found = run_request(request, RichProgress(), _say)
    if json_:
        _print_json(found.content)
    else:
        typer.echo(found.text)
    if found.failed:
        raise typer.Exit(1)


_EXPORT_HELP = """Write an artifact as ONNX or as a torch.export program, and check its outputs.

Example:

`dscore export runs/r56 --format onnx`
"""


@app.command(help=_EXPORT_HELP)
def export(
    folder: Annotated[Path, typer.Argument(help="An artifact.")],
    format_: Annotated[str, typer.Option("--format", help="onnx or torch-export.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="The file.", show_default=False)] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of the example.")] = 1,
    force: Force = False,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Export an artifact."""
    from dscore_plugin.export import export_folder

    written = export_folder(folder, out, form=format_, batch=batch, force=force)
    found = {"path": str(written.path), "format": written.form, "difference": written.difference}
    if json_:
        _print_json(found)
    else:
        typer.echo(f"{written.path}: largest difference {written.difference:.2g}")


_LIST_HELP = """List the criteria: name, paper, granularity, what each needs.

Examples:

`dscore list`

`dscore list --json`
"""


@app.command("list", help=_LIST_HELP)
def list_(seed: Seed = 0, json_: Json = False) -> None:
    """List the criteria."""
    infos = list_criteria()
    if json_:
        keys = (
            "name",
            "kind",
            "paper",
            "arxiv",
            "granularity",
            "needs_data",
            "needs_gradients",
            "needs_batchnorm",
        )
        rows = [{key: getattr(info, key) for key in (*keys, "baseline", "summary")} for info in infos]
        _print_json({"criteria": rows})
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    for heading, longest in (("prunes", "channel,"), ("needs", "gradients"), ("paper", "2308.04470")):
        table.add_column(heading, min_width=len(longest))
    table.add_column("what it is", overflow="fold")
    for info in infos:
        needs = [what for what in ("data", "gradients", "batchnorm") if getattr(info, f"needs_{what}")]
        needs += ["a search"] if info.kind == "selector" else []
        paper = f"{info.paper.split(',')[0]}, {info.arxiv}" if info.arxiv != "-" else "-"
        table.add_row(info.name, ", ".join(info.granularity), ", ".join(needs), paper, info.summary)
    Console().print(table)


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content))


def _say(line: str) -> None:
    _errors.print(line, markup=False)


def main() -> NoReturn:
    """Run the command line; bad input gives one line on stderr and exit code 2, Ctrl-C 130."""
    try:
        app()
    except DScoreError as error:
        _errors.print(f"dscore: {error}", style="red", markup=False)
        raise SystemExit(2) from None
    except SystemExit as stop:
        if stop.code == 130:  # typer's exit code for Ctrl-C
            _errors.print(
                "dscore: stopped; what was finished stays, and --resume goes on with it", style="red"
            )
        raise
    raise SystemExit(0)


if __name__ == "__main__":
    main()
