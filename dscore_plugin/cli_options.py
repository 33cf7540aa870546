"""The options that several commands share: declared once, each with its default."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dscore_plugin.errors import DScoreError

if TYPE_CHECKING:
    from dscore_plugin.jobs import Choice, Source

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Seed = Annotated[
    int, typer.Option(min=0, help="Of the validation split, the training and everything random.")
]
Data = Annotated[
    str, typer.Option(help="digits, cifar10[:PATH], cifar100[:PATH], svhn[:PATH] or imagefolder:PATH.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]


def _share(text: str) -> Any:
    return Annotated[float | None, typer.Option(metavar="F", help=text, show_default=False)]


Options = Mapping[str, tuple[Any, Any]]  # name -> annotation, default

SOURCE: Options = {
    "model": (
        Annotated[
            str,
            typer.Option(help="A name in timm's registry; the CIFAR networks of the papers are there too."),
        ],
        "digits_cnn",
    ),
    "weights": (
        Annotated[
            str | None,
            typer.Option(
                metavar="FILE", help="Safetensors weights of the dense network.", show_default=False
            ),
        ],
        None,
    ),
    "data": (Data, "digits"),
    "model_arg": (
        Annotated[
            list[str] | None,
            typer.Option("--model-arg", metavar="NAME=VALUE", help="A further argument of the model."),
        ],
        None,
    ),
    "image_size": (
        Annotated[int | None, typer.Option(min=8, help="For image folders.", show_default=False)],
        None,
    ),
    "device": (Annotated[str, typer.Option(help="auto, cpu, cuda, ...")], "auto"),
    "seed": (Seed, 0),
}

CRITERION: Options = {
    "criterion": (Annotated[str, typer.Option(help="See: dscore list.")], "d_score"),
    "layers": (Annotated[str, typer.Option(help="all, or inner: residual sums stay whole.")], "all"),
    "calibration_images": (Annotated[int, typer.Option(min=1, help="For criteria that look at data.")], 1024),
    "criterion_option": (
        Annotated[
            list[str] | None,
            typer.Option(
                "--criterion-option", metavar="NAME=VALUE", help="A further argument of the criterion."
            ),
        ],
        None,
    ),
}

GOAL_NAMES = (
    "ratio",
    "target_macs",
    "target_params",
    "target_latency",
    "threshold",
    "max_drop",
    "keep_layers",
)
GOAL: Options = {
    "ratio": (
        Annotated[
            float | None,
            typer.Option(metavar="R", help="Share of the channels to remove, in (0, 1).", show_default=False),
        ],
        None,
    ),
    "target_macs": (_share("Share of the MACs to keep, in (0, 1)."), None),
    "target_params": (_share("Share of the parameters to keep, in (0, 1)."), None),
    "target_latency": (_share("Share of the latency to keep, measured here, in (0, 1)."), None),
    "threshold": (
        Annotated[
            float | None,
            typer.Option(
                metavar="A", help="Accuracy in percent that every layer alone must keep.", show_default=False
            ),
        ],
        None,
    ),
    "max_drop": (
        Annotated[
            float | None,
            typer.Option(metavar="P", help="The same, as points below dense.", show_default=False),
        ],
        None,
    ),
    "keep_layers": (
        Annotated[
            int | None, typer.Option(metavar="K", help="Residual branches that stay.", show_default=False)
        ],
        None,
    ),
    "granularity": (
        Annotated[
            str | None,
            typer.Option(help="channel, kernel or layer; default: the criterion's.", show_default=False),
        ],
        None,
    ),
    "allocation": (
        Annotated[
            str,
            typer.Option(
                help="uniform: the same share of every layer; global: lowest scores first; sensitivity: measured."
            ),
        ],
        "uniform",
    ),
    "min_channels": (
        Annotated[int, typer.Option(min=1, help="Channels that every layer keeps at least.")],
        1,
    ),
    "round_to": (
        Annotated[
            int | None, typer.Option(min=1, help="Keep a multiple of so many channels.", show_default=False)
        ],
        None,
    ),
    "latency_batch": (Annotated[int, typer.Option(min=1, help="Images at a time, for --target-latency.")], 1),
    "table": (
        Annotated[
            str | None,
            typer.Option(
                "--sensitivity",
                metavar="FILE",
                help="A sensitivity.json, instead of measuring.",
                show_default=False,
            ),
        ],
        None,
    ),
}

ANALYSIS: Options = {
    "images": (
        Annotated[int, typer.Option(min=1, help="Validation images of a sensitivity analysis.")],
        2000,
    ),
    "ratios": (
        Annotated[
            str | None,
            typer.Option(
                metavar="R,R,...", help="Of a sensitivity analysis; default 0.05 to 0.95.", show_default=False
            ),
        ],
        None,
    ),
    "paper_protocol": (
        Annotated[
            bool,
            typer.Option(
                "--paper-protocol", help="Analyse sensitivity on the test images, as the paper did."
            ),
        ],
        False,
    ),
    "early_exit": (
        Annotated[
            float | None,
            typer.Option(
                metavar="P", help="Give a layer up P points below dense: faster.", show_default=False
            ),
        ],
        None,
    ),
    "fold_batchnorm": (
        Annotated[
            bool,
            typer.Option(
                "--fold-batchnorm", help="Fold batch norm for the analysis: faster, equal up to rounding."
            ),
        ],
        False,
    ),
    "rerank": (
        Annotated[
            bool, typer.Option("--rerank", help="Score a layer anew after every step, as D-Score's code.")
        ],
        False,
    ),
}


def _search(of: type, text: str, **more: Any) -> tuple[Any, None]:
    return Annotated[of | None, typer.Option(help=text, show_default=False, **more)], None


# Of criteria that search; those that are given become arguments of the criterion.
SEARCH: Options = {
    "selection_images": _search(
        int, "dcp: training images to choose by; coarse: validation images; energy: training images.", min=1
    ),
    "channels_per_step": _search(int, "dcp: channels added at a time; the paper's 1 by default.", min=1),
    "head_epochs": _search(int, "dcp: epochs of fine-tuning with the additional heads.", min=0),
    "candidates": _search(str, "coarse: random masks to draw, or auto."),
    "proposal": _search(str, "coarse: uniform, or a criterion to draw the masks around."),
    "racing": (
        Annotated[
            bool | None,
            typer.Option("--racing", help="coarse: stop hopeless masks early.", show_default=False),
        ],
        None,
    ),
}

# Of every training, fields of TrainingConfig; see read_training().
TRAINING: Options = {
    "mixup": (
        Annotated[float, typer.Option(metavar="ALPHA", help="Blend pairs of images; 0 leaves it out.")],
        0.0,
    ),
    "cutmix": (
        Annotated[float, typer.Option(metavar="ALPHA", help="Paste boxes into images; 0 leaves it out.")],
        0.0,
    ),
    "ema": (
        Annotated[
            float,
            typer.Option(
                metavar="DECAY", help="Keep a moving average of the weights, such as 0.999; 0 leaves it out."
            ),
        ],
        0.0,
    ),
    "accumulate": (
        Annotated[int, typer.Option(min=1, help="Parts to compute a batch in, where memory is small.")],
        1,
    ),
    "track": (
        Annotated[
            str | None,
            typer.Option(
                metavar="TRACKER",
                help="tensorboard or wandb: write the history there, too, in OUT.logs.",
                show_default=False,
            ),
        ],
        None,
    ),
}


def with_options(*shared: Options) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of these sets; it gets them as keyword arguments beside its own."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        parameters = own + [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for options in shared
            for name, (annotation, default) in options.items()
        ]

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            command(**arguments)

        del run.__wrapped__  # typer would look past the signature
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return wrap


def read_source(options: Mapping[str, Any]) -> Source:
    """Read which network and which images are meant."""
    from dscore_plugin.jobs import Source

    given = {name: options[name] for name in ("model", "data", "weights", "image_size", "seed", "device")}
    return Source(**given, model_args=pairs("--model-arg", options["model_arg"]))


def read_choice(options: Mapping[str, Any]) -> Choice:
    """Read how it is to be chosen what leaves; options that the command does not have keep their defaults."""
    from dscore_plugin.jobs import Analysis, Choice
    from dscore_plugin.selection.sensitivity import RATIOS

    analysis = {field.name: options[field.name] for field in fields(Analysis) if field.name in options}
    analysis["ratios"] = numbers("--ratios", options["ratios"]) or RATIOS
    given = {field.name: options[field.name] for field in fields(Choice) if field.name in options}
    search = {name: options[name] for name in SEARCH if options.get(name) is not None}
    if isinstance(candidates := search.get("candidates"), str) and candidates.isdigit():
        search["candidates"] = int(candidates)
    criterion_options = search | pairs("--criterion-option", options["criterion_option"])
    return Choice(**given, criterion_options=criterion_options, analysis=Analysis(**analysis))


def read_training(options: Mapping[str, Any]) -> dict[str, Any]:
    """Read the shared options of a training, as arguments of TrainingConfig."""
    return {name: options[name] for name in TRAINING}


def require_unused(context: typer.Context, names: Collection[str], reason: str) -> None:
    """Refuse options that stand on the command line and would be ignored.

    Args:
        context: of the command.
        names: the options' arguments.
        reason: why they would be, and what to do, as the end of a sentence.

    Raises:
        DScoreError: naming them.
    """
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in names
        and (source := context.get_parameter_source(parameter.name))
        and source.name == "COMMANDLINE"
    ]
    if given:
        raise DScoreError(f"{', '.join(given)} would be ignored: {reason}")


def whole_numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Read a list of whole numbers, separated by commas."""
    found = numbers(option, text)
    if not all(number.is_integer() for number in found):
        raise DScoreError(f"{option} {text!r} is no list of whole numbers, such as 1,2,3")
    return tuple(map(int, found))


def numbers(option: str, text: str | None) -> tuple[float, ...]:
    """Read a list of numbers, separated by commas."""
    try:
        return tuple(float(number) for number in text.split(",")) if text else ()
    except ValueError as error:
        raise DScoreError(f"{option} {text!r} is no list of numbers, such as 1,2,3") from error


def pairs(option: str, texts: list[str] | None) -> dict[str, Any]:
    """Read ``NAME=VALUE`` pairs; a value that is JSON is taken as such, anything else as text."""
    arguments: dict[str, Any] = {}
    for text in texts or []:
        name, separator, value = text.partition("=")
        if not separator or not name.isidentifier():
            raise DScoreError(f"{option} {text!r} is no NAME=VALUE pair, such as drop_rate=0.1")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments
