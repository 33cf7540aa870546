"""What a script that fine-tunes a pruned network needs beside the training loop; see ``examples/``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from accelerate import PartialState
from torch import nn

from dscore_plugin.artifact import METRICS, load_pruned, read_structure, save_pruned
from dscore_plugin.costs import count
from dscore_plugin.files import ensure_writable, read_json, write_json
from dscore_plugin.hub import create_model
from dscore_plugin.plan import ChannelRemoval
from dscore_plugin.planning import plan_pruning
from dscore_plugin.report.numbers import file_sizes
from dscore_plugin.report.tables import report_markdown
from dscore_plugin.runs import open_work
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.history import TrainingResult
from dscore_plugin.training.loop import new_accelerator

_RECORDED = ("architecture", "model_args", "input_shape", "plan", "criterion", "numbers")


@dataclass(frozen=True)
class PrunedNetwork:
    """A pruned network, and what its artifact says about it.

    Attributes:
        model: the network.
        record: arguments of :func:`dscore_plugin.save_pruned`, as far as they are known.
        metrics: the content of ``metrics.json``.
    """

    model: nn.Module
    record: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    def save(
        self,
        folder: Path,
        *,
        top1: float | None = None,
        result: TrainingResult | None = None,
        command: str | None = None,
        force: bool = False,
    ) -> Path:
        """Save the network, with its record, as an artifact that appears completely or not at all.

        Args:
            folder: where to.
            top1: percent, after fine-tuning; None where it was not fine-tuned.
            result: of the fine-tuning; becomes ``history.json``.
            command: the command line, for the report.
            force: replace an existing folder.

        Raises:
            ArtifactError: as :func:`dscore_plugin.save_pruned`.
        """
        metrics = self.metrics
        if top1 is not None:
            finetuned = {**(metrics.get("pruned") or {}), "top1": top1}
            validation = result.final.validation_top1 if result else None
            metrics = {**metrics, "finetuned": finetuned, "validation_top1": validation}

        def report(partial: Path) -> str:
            if result:
                write_json(partial / "history.json", result.rows())
            structure, sizes = read_structure(partial), file_sizes(partial)
            return report_markdown(structure, metrics, sizes=sizes, command=command, folder=str(folder))

        return save_pruned(self.model, folder, **self.record, metrics=metrics, report=report, force=force)


def open_pruned(source: str | Path) -> PrunedNetwork:
    """Load a pruned network with its record.

    Args:
        source: a folder that ``save_pruned`` wrote; or an address on the Hub, of which the weights alone are taken.

    Raises:
        DScoreError: if there is none.
    """
    if not Path(source).is_dir():
        return PrunedNetwork(create_model(source))
    structure = read_structure(source)
    record = {key: structure[key] for key in _RECORDED} | {"history": structure["pruning_history"]}
    metrics = Path(source) / METRICS
    return PrunedNetwork(load_pruned(source), record, read_json(metrics) if metrics.exists() else {})


def prune_network(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    criterion: str,
    *,
    architecture: str | None = None,
    model_args: dict[str, Any] | None = None,
    **goal: Any,
) -> PrunedNetwork:
    """Prune a dense network, in place, by a criterion that looks at its weights alone.

    Args:
        model: the network.
        input_shape: ``(C, H, W)``.
        criterion: a name from ``dscore list``.
        architecture: its name in timm's registry; None asks the model.
        model_args: the arguments that build it; None asks the model.
        **goal: ``target_macs`` and further arguments of :func:`dscore_plugin.plan_pruning`.

    Raises:
        DScoreError: on bad input.
    """
    example = torch.zeros(1, *input_shape, device=next(model.parameters()).device)
    dense = dict(zip(("macs", "params"), count(model, example), strict=True))
    plan = plan_pruning(model, example, criterion, **goal)
    plan.apply(model, (example,), strict=False)
    pruned = dict(zip(("macs", "params"), count(model, example), strict=True))
    record = {
        "architecture": architecture,
        "model_args": model_args,
        "input_shape": input_shape,
        "plan": plan.to_dict(),
        "history": [
            [r.layer, True, list(r.channels)] for r in plan.removals if isinstance(r, ChannelRemoval)
        ],
        "criterion": criterion,
        "numbers": {"before": dense, "after": pruned},
    }
    return PrunedNetwork(model, record, {"dense": dense, "pruned": pruned})


def make_once(folder: Path, make: Callable[[], PrunedNetwork]) -> PrunedNetwork:
    """Make a network in the main process, and load it in all; a resumed run loads it, too.

    Args:
        folder: what keeps it; all processes, on all machines, see the same one.
        make: gives the network.
    """
    with PartialState().main_process_first():
        if not folder.exists():
            make().save(folder)
        return open_pruned(folder)


def open_run(out: Path, options: Mapping[str, Any], *, force: bool = False, resume: bool = False) -> Path:
    """Start the group of processes, and give the folder beside ``out`` that keeps a run until its end: ``OUT.work``.

    Args:
        out: the result's folder.
        options: of the run; an interrupted run and its continuation must have them in common. Those of the training
            are left to its checkpoint.
        force: replace the result, or an unfinished run.
        resume: go on with an unfinished run, if there is one.

    Raises:
        ArtifactError: if ``out`` exists and ``force`` is not given; if there is an unfinished run and neither
            is given, or it had other options.
        TrainingError: if accelerate cannot be started as the training needs it.
    """
    ensure_writable(out, force)
    work = out.with_name(out.name + ".work")
    new_accelerator()
    left_out = {"out", "force", "resume", *(option.name for option in fields(TrainingConfig))}
    identity = {
        name: value if value is None or isinstance(value, int | float) else str(value)
        for name, value in options.items()
        if name not in left_out
    }
    open_work(work, identity, lambda _: None, force=force, resume=resume)
    return work


def add_training_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add one option for each field of :class:`~dscore_plugin.training.config.TrainingConfig`.

    Args:
        parser: gets ``--learning-rate``, ``--mixup`` and so on.
        **defaults: where they shall differ from the configuration's; ``epochs`` has none of its own.
    """
    hints, group = get_type_hints(TrainingConfig), parser.add_argument_group("training, see TrainingConfig")
    for option in fields(TrainingConfig):
        default = defaults.get(option.name, option.default)
        settings: dict[str, Any] = {"default": None if default is MISSING else default}
        if hints[option.name] is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif option.name == "milestones":
            settings |= {"type": int, "nargs": "*", "metavar": "EPOCH"}
        else:
            kinds = [kind for kind in (int, float) if kind is hints[option.name]]
            settings |= {"type": kinds[0] if kinds else str, "required": default is MISSING}
            settings["metavar"] = _choices(hints[option.name]) or option.name.upper()
        flag = f"--{option.name.replace('_', '-')}"
        group.add_argument(flag, help=f"default {settings['default']}", **settings)


def read_training_options(arguments: argparse.Namespace) -> TrainingConfig:
    """Make the configuration of what :func:`add_training_options` has parsed.

    Raises:
        TrainingError: if a value is out of range.
    """
    return TrainingConfig(
        **{option.name: getattr(arguments, option.name) for option in fields(TrainingConfig)}
    )


def _choices(hint: Any) -> str:
    """Return the texts that a type allows, as a usage shows them."""
    found = [
        choice for part in (hint, *get_args(hint)) for choice in get_args(part) if isinstance(choice, str)
    ]
    return "|".join(dict.fromkeys(found))
