"""The command line: parses, calls the pipeline, prints. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from dscore_plugin.errors import DScoreError
from dscore_plugin.registry import list_criteria

if TYPE_CHECKING:
    from dscore_plugin.pipeline import Analysis

app = typer.Typer(
    help="Prune networks with paper-faithful criteria.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
_errors = Console(stderr=True, soft_wrap=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Seed = Annotated[
    int, typer.Option(min=0, help="Of the validation split, the training and everything random.")
]
Model = Annotated[
    str, typer.Option(help="A name in timm's registry; the CIFAR networks of the papers are there too.")
]
ModelArg = Annotated[
    list[str] | None,
    typer.Option("--model-arg", metavar="NAME=VALUE", help="A further argument of the model."),
]
Weights = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Safetensors weights of the dense network.", show_default=False),
]
Data = Annotated[
    str, typer.Option(help="digits, cifar10[:PATH], cifar100[:PATH], svhn[:PATH] or imagefolder:PATH.")
]
ImageSize = Annotated[int | None, typer.Option(min=8, help="For image folders.", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
Criterion = Annotated[str, typer.Option(help="See: dscore list.")]
Ratio = Annotated[
    float | None,
    typer.Option(metavar="R", help="Share of the channels to remove, in (0, 1).", show_default=False),
]
TargetMacs = Annotated[
    float | None, typer.Option(metavar="F", help="Share of the MACs to keep, in (0, 1).", show_default=False)
]
TargetParams = Annotated[
    float | None,
    typer.Option(metavar="F", help="Share of the parameters to keep, in (0, 1).", show_default=False),
]
TargetLatency = Annotated[
    float | None,
    typer.Option(
        metavar="F", help="Share of the latency to keep, measured here, in (0, 1).", show_default=False
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        metavar="A", help="Accuracy in percent that every layer alone must keep.", show_default=False
    ),
]
MaxDrop = Annotated[
    float | None, typer.Option(metavar="P", help="The same, as points below dense.", show_default=False)
]
Allocation = Annotated[
    str,
    typer.Option(
        help="uniform: the same share of every layer; global: lowest scores first; sensitivity: measured."
    ),
]
LatencyBatch = Annotated[int, typer.Option(min=1, help="Images at a time, for --target-latency.")]
TableFile = Annotated[
    str | None,
    typer.Option(
        "--sensitivity", metavar="FILE", help="A sensitivity.json, instead of measuring.", show_default=False
    ),
]
Images = Annotated[int, typer.Option(min=1, help="Validation images of a sensitivity analysis.")]
Ratios = Annotated[
    str | None,
    typer.Option(
        metavar="R,R,...", help="Of a sensitivity analysis; default 0.05 to 0.95.", show_default=False
    ),
]
PaperProtocol = Annotated[
    bool, typer.Option("--paper-protocol", help="Analyse sensitivity on the test images, as the paper did.")
]
EarlyExit = Annotated[
    float | None,
    typer.Option(metavar="P", help="Give a layer up P points below dense: faster.", show_default=False),
]
FoldBatchnorm = Annotated[
    bool,
    typer.Option("--fold-batchnorm", help="Fold batch norm for the analysis: faster, equal up to rounding."),
]
Rerank = Annotated[
    bool, typer.Option("--rerank", help="Score a layer anew after every step, as D-Score's code.")
]
Calibration = Annotated[int, typer.Option(min=1, help="For criteria that look at data.")]
Layers = Annotated[str, typer.Option(help="all, or inner: residual sums stay whole.")]
MinChannels = Annotated[int, typer.Option(min=1, help="Channels that every layer keeps at least.")]
RoundTo = Annotated[
    int | None, typer.Option(min=1, help="Keep a multiple of so many channels.", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]

_PRUNE_HELP = """Prune a network, fine-tune it, save it with a report.

Without arguments: a small CNN on scikit-learn's digits, trained first, in under two minutes.

Examples:

`dscore prune`

`dscore prune --model cifar_resnet56 --weights resnet56.safetensors --data cifar10:PATH --criterion d_score
--target-macs 0.5 --epochs 2 --out runs/r56`
"""


@app.command(help=_PRUNE_HELP)
def prune(
    model: Model = "digits_cnn",
    weights: Weights = None,
    data: Data = "digits",
    criterion: Criterion = "d_score",
    ratio: Ratio = None,
    target_macs: TargetMacs = None,
    target_params: TargetParams = None,
    target_latency: TargetLatency = None,
    threshold: Threshold = None,
    max_drop: MaxDrop = None,
    allocation: Allocation = "uniform",
    layers: Layers = "all",
    min_channels: MinChannels = 1,
    round_to: RoundTo = None,
    latency_batch: LatencyBatch = 1,
    table: TableFile = None,
    images: Images = 2000,
    ratios: Ratios = None,
    paper_protocol: PaperProtocol = False,
    early_exit: EarlyExit = None,
    fold_batchnorm: FoldBatchnorm = False,
    rerank: Rerank = False,
    plan: Annotated[
        Path | None, typer.Option(help="Apply this plan instead of choosing.", show_default=False)
    ] = None,
    calibration_images: Calibration = 1024,
    epochs: Annotated[int, typer.Option(min=0, help="Of fine-tuning; 0 leaves it out.")] = 10,
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    model_arg: ModelArg = None,
    image_size: ImageSize = None,
    device: Device = "auto",
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Prune a network, fine-tune it, save it with a report."""
    from dscore_plugin.pipeline import Choice, PruneJob, Source, default_out, run_prune
    from dscore_plugin.report.tables import print_metrics
    from dscore_plugin.training.config import TrainingConfig
    from dscore_plugin.training.progress import RichProgress

    goals = (ratio, target_macs, target_params, target_latency, threshold, max_drop)
    if plan is None and all(goal is None for goal in goals):
        target_macs = 0.5
    checked_there: dict[str, Any] = {"schedule": schedule, "precision": precision}
    checked_there["milestones"] = tuple(int(epoch) for epoch in _numbers("--milestones", milestones))
    training = None
    if epochs:
        training = TrainingConfig(
            epochs=epochs, learning_rate=learning_rate, batch_size=batch_size, weight_decay=weight_decay,
            label_smoothing=label_smoothing, workers=workers, seed=seed, **checked_there,
        )  # fmt: skip
    job = PruneJob(
        Source(model, data, weights, _model_args(model_arg), image_size, seed, device),
        Choice(
            criterion=criterion,
            ratio=ratio,
            target_macs=target_macs,
            target_params=target_params,
            target_latency=target_latency,
            threshold=threshold,
            max_drop=max_drop,
            allocation=allocation,
            layers=layers,
            min_channels=min_channels,
            round_to=round_to,
            latency_batch=latency_batch,
            calibration_images=calibration_images,
            table=table,
            analysis=_analysis(images, ratios, paper_protocol, early_exit, fold_batchnorm, rerank),
        ),  # fmt: skip
        out or default_out(model, criterion),
        plan=plan,
        training=training,
        dense_epochs=dense_epochs,
        recalibrate=not no_recalibrate,
        force=force,
        resume=resume,
        command=shlex.join(["dscore", *sys.argv[1:]]),
    )
    metrics = run_prune(job, RichProgress(), _say)
    if json_:
        _print_json({"folder": str(job.out), **metrics})
    else:
        print_metrics(metrics, title=f"{model}, {criterion}", console=Console())


_EVALUATE_HELP = """Measure an artifact, or a dense network, on the test images.

Examples:

`dscore evaluate runs/r56 --data cifar10:PATH`

`dscore evaluate --model cifar_resnet56 --weights resnet56.safetensors --data cifar10:PATH`
"""


@app.command(help=_EVALUATE_HELP)
def evaluate(
    folder: Annotated[Path | None, typer.Argument(help="An artifact.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="A dense network instead.", show_default=False)] = None,
    weights: Weights = None,
    data: Data = "digits",
    model_arg: ModelArg = None,
    image_size: ImageSize = None,
    device: Device = "auto",
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Measure an artifact, or a dense network, on the test images."""
    from dscore_plugin.pipeline import Source, require_one, run_evaluate
    from dscore_plugin.training.progress import RichProgress

    require_one(folder, model)
    source = Source(model or "", data, weights, _model_args(model_arg), image_size, seed, device)
    numbers = run_evaluate(folder, source, RichProgress())
    if json_:
        _print_json(numbers)
        return
    table = Table(title=str(folder or model))
    for heading in ("top-1", "images", "MACs", "parameters", "latency, batch 1", "latency, batch 64"):
        table.add_column(heading, justify="right")
    milliseconds = [f"{entry['median']:.2f} ms" for entry in numbers["latency_ms"].values()]
    table.add_row(
        f"{numbers['top1']:.2f} %", f"{numbers['images']:,}", f"{numbers['macs'] / 1e6:.2f} M",
        f"{numbers['params']:,}", *milliseconds,
    )  # fmt: skip
    Console().print(table)


_PLAN_HELP = """Choose what leaves a network, and write it down as a plan one can read and edit.

Example:

`dscore plan --model cifar_resnet56 --weights resnet56.safetensors --data cifar10:PATH --target-macs 0.5
--out plan.json`
"""


@app.command(help=_PLAN_HELP)
def plan(
    out: Annotated[Path, typer.Option(help="The plan's file.")],
    model: Model = "digits_cnn",
    weights: Weights = None,
    data: Data = "digits",
    criterion: Criterion = "d_score",
    ratio: Ratio = None,
    target_macs: TargetMacs = None,
    target_params: TargetParams = None,
    target_latency: TargetLatency = None,
    threshold: Threshold = None,
    max_drop: MaxDrop = None,
    allocation: Allocation = "uniform",
    layers: Layers = "all",
    min_channels: MinChannels = 1,
    round_to: RoundTo = None,
    latency_batch: LatencyBatch = 1,
    table: TableFile = None,
    images: Images = 2000,
    ratios: Ratios = None,
    paper_protocol: PaperProtocol = False,
    early_exit: EarlyExit = None,
    fold_batchnorm: FoldBatchnorm = False,
    rerank: Rerank = False,
    calibration_images: Calibration = 1024,
    force: Force = False,
    model_arg: ModelArg = None,
    image_size: ImageSize = None,
    device: Device = "auto",
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Choose what leaves a network, and write it down."""
    from dscore_plugin.errors import PlanError
    from dscore_plugin.pipeline import Choice, Source, run_plan

    if out.exists() and not force:
        raise PlanError(f"{out} exists already; choose another file, or replace it with --force")
    chosen = run_plan(
        Source(model, data, weights, _model_args(model_arg), image_size, seed, device),
        Choice(
            criterion=criterion,
            ratio=ratio,
            target_macs=target_macs,
            target_params=target_params,
            target_latency=target_latency,
            threshold=threshold,
            max_drop=max_drop,
            allocation=allocation,
            layers=layers,
            min_channels=min_channels,
            round_to=round_to,
            latency_batch=latency_batch,
            calibration_images=calibration_images,
            table=table,
            analysis=_analysis(images, ratios, paper_protocol, early_exit, fold_batchnorm, rerank),
        ),  # fmt: skip
    )
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
def sensitivity(
    out: Annotated[Path, typer.Option(help="The folder of the table and its picture.")],
    model: Model = "digits_cnn",
    weights: Weights = None,
    data: Data = "digits",
    criterion: Criterion = "d_score",
    layers: Layers = "all",
    images: Images = 2000,
    ratios: Ratios = None,
    paper_protocol: PaperProtocol = False,
    early_exit: EarlyExit = None,
    fold_batchnorm: FoldBatchnorm = False,
    rerank: Rerank = False,
    calibration_images: Calibration = 1024,
    force: Force = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted analysis.")] = False,
    model_arg: ModelArg = None,
    image_size: ImageSize = None,
    device: Device = "auto",
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Measure the accuracy of a network with each layer pruned alone."""
    from dscore_plugin.pipeline import Choice, Source, run_sensitivity
    from dscore_plugin.training.progress import RichProgress

    analysis = _analysis(images, ratios, paper_protocol, early_exit, fold_batchnorm, rerank)
    measured = run_sensitivity(
        Source(model, data, weights, _model_args(model_arg), image_size, seed, device),
        Choice(criterion, layers=layers, calibration_images=calibration_images, analysis=analysis),
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


_TRAIN_HELP = """Train a network: dense, or towards sparsity, then prune it and train it again.

Examples:

`dscore train --model cifar_vgg16_bn --data cifar10:PATH --epochs 60 --lr 0.1 --out runs/vgg16`

`dscore train --model cifar_preresnet56 --data cifar10:PATH --sparsity dependency_aware --target 0.5 --epochs 160
--out runs/sparse`
"""


@app.command(help=_TRAIN_HELP)
def train(
    out: Annotated[Path, typer.Option(help="The folder of the result.")],
    model: Model = "digits_cnn",
    weights: Annotated[
        str | None, typer.Option(metavar="FILE", help="Weights to begin with.", show_default=False)
    ] = None,
    data: Data = "digits",
    sparsity: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="dependency_aware; default: dense.", show_default=False),
    ] = None,
    target: Annotated[float, typer.Option(help="Share of the scored channels to remove.")] = 0.5,
    delta: Annotated[
        float | None, typer.Option(help="Step of lambda; default: the paper's, scaled.", show_default=False)
    ] = None,
    min_channels: Annotated[int, typer.Option(min=1, help="Channels that every layer keeps at least.")] = 8,
    epochs: Annotated[int, typer.Option(min=1, help="Of each phase.")] = 160,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", help="At its peak.")] = 0.1,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default 128; 64 with --sparsity.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default 5e-4; 1e-4 with --sparsity.")] = None,
    label_smoothing: Annotated[float, typer.Option()] = 0.0,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 0,
    force: Force = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    model_arg: ModelArg = None,
    image_size: ImageSize = None,
    device: Device = "auto",
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Train a network."""
    from dscore_plugin.pipeline import Source
    from dscore_plugin.report.tables import print_metrics
    from dscore_plugin.sparse_training import SparsityGoal, TrainJob, paper_schedule, run_train
    from dscore_plugin.training.config import TrainingConfig
    from dscore_plugin.training.progress import RichProgress

    given = {"batch_size": batch_size, "weight_decay": weight_decay}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    options |= {"learning_rate": learning_rate, "label_smoothing": label_smoothing, "precision": precision}
    options |= {"workers": workers, "seed": seed}
    goal = None
    if sparsity is None:
        training = TrainingConfig(epochs, **options)
    else:
        sparse, training = paper_schedule(epochs, **options)
        goal = SparsityGoal(target, sparse, sparsity, delta, min_channels=min_channels)
    job = TrainJob(
        Source(model, data, weights, _model_args(model_arg), image_size, seed, device),
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
        print_metrics(metrics, title=f"{model}, {sparsity or 'dense'}", console=Console())


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
    for heading in ("name", "kind", "prunes", "needs", "paper", "what it is"):
        table.add_column(heading, no_wrap=heading in ("name", "kind", "prunes"))
    for info in infos:
        needs = [what for what in ("data", "gradients", "batchnorm") if getattr(info, f"needs_{what}")]
        paper = f"{info.paper.split(',')[0]}, {info.arxiv}" if info.arxiv != "-" else "-"
        table.add_row(
            info.name, info.kind, ", ".join(info.granularity), ", ".join(needs), paper, info.summary
        )
    Console().print(table)


def _analysis(
    images: int,
    ratios: str | None,
    paper_protocol: bool,
    early_exit: float | None,
    fold_batchnorm: bool,
    rerank: bool,
) -> Analysis:
    """Read how a sensitivity analysis is to be done."""
    from dscore_plugin.pipeline import Analysis
    from dscore_plugin.selection.sensitivity import RATIOS

    steps = _numbers("--ratios", ratios) or RATIOS
    return Analysis(images, steps, paper_protocol, early_exit, fold_batchnorm, rerank)


def _numbers(option: str, text: str | None) -> tuple[float, ...]:
    """Read a list of numbers, separated by commas."""
    try:
        return tuple(float(number) for number in text.split(",")) if text else ()
    except ValueError as error:
        raise DScoreError(f"{option} {text!r} is no list of numbers, such as 1,2,3") from error


def _model_args(pairs: list[str] | None) -> dict[str, Any]:
    """Read ``NAME=VALUE`` pairs; a value that is JSON is taken as such, anything else as text."""
    arguments: dict[str, Any] = {}
    for pair in pairs or []:
        name, separator, value = pair.partition("=")
        if not separator or not name.isidentifier():
            raise DScoreError(f"--model-arg {pair!r} is no NAME=VALUE pair, such as drop_rate=0.1")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments


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
