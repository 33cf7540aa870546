"""The command lines that repeat a run: the options of ``dscore`` for a source, a choice and a training."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from typing import Any

from dscore_plugin.jobs import Choice, Source
from dscore_plugin.training.config import NO_EFFECT, TrainingConfig

_OPTION_NAMES = {"table": "sensitivity"}
_PAIRS = {"criterion_options": "criterion-option", "model_args": "model-arg"}


def prune_command(
    source: Source,
    choice: Choice,
    training: TrainingConfig,
    rounds: int = 1,
    round_epochs: int = 0,
    *,
    recalibrate: bool = True,
    out: str,
) -> str:
    """Write a run as ``dscore prune ...``; options that have their defaults are left out.

    Args:
        source: network, weights, images, seed.
        choice: what leaves.
        training: after the last round; its seed is the source's. What changes no weight is left out.
        rounds: in how many steps the goal is approached.
        round_epochs: of fine-tuning after every step but the last.
        recalibrate: whether batch norm's statistics are measured again.
        out: the folder of the artifact.
    """
    words = [*_options(source), *_choice_options(choice)]
    words += ["--epochs", str(training.epochs), *_options(training, but=("epochs", "seed", *NO_EFFECT))]
    if rounds > 1:
        words += ["--rounds", str(rounds), "--round-epochs", str(round_epochs)]
    if not recalibrate:
        words.append("--no-recalibrate")
    return shlex.join(["dscore", "prune", *words, "--out", out])


def sensitivity_command(source: Source, choice: Choice, out: str) -> str:
    """Write a sensitivity analysis as ``dscore sensitivity ...``; options that have their defaults are left out.

    Args:
        source: network, weights, images, seed.
        choice: the criterion, and how to measure.
        out: the folder of the table.
    """
    words = [*_options(source), *_choice_options(choice)]
    return shlex.join(["dscore", "sensitivity", *words, "--out", out])


def _choice_options(choice: Choice) -> list[str]:
    """Write a choice; its criterion is named in any case, for those who read the line."""
    rest = [*_options(choice, but=("criterion", "analysis")), *_options(choice.analysis)]
    return ["--criterion", choice.criterion, *rest]


def changed_fields(settings: Any, but: Collection[str] = ()) -> dict[str, Any]:
    """Return the fields of a dataclass that have other values than their defaults, but for those named."""
    changed = {}
    for item in fields(settings):
        default = item.default_factory() if callable(item.default_factory) else item.default
        if item.name not in but and (value := getattr(settings, item.name)) != default:
            changed[item.name] = value
    return changed


def _options(settings: Any, but: Collection[str] = ()) -> Iterator[str]:
    """Write the fields that differ from their defaults as options."""
    for name, value in changed_fields(settings, but).items():
        yield from _option(name, value)


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [
            word for pair in value.items() for word in (f"--{_PAIRS[name]}", f"{pair[0]}={_text(pair[1])}")
        ]
    option = "--" + _OPTION_NAMES.get(name, name).replace("_", "-")
    if isinstance(value, bool):
        return [option if value else option.replace("--", "--no-", 1)]
    return [option, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
