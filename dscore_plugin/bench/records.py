"""What is left of a finished cell: one flat record, and the files that hold such records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dscore_plugin.artifact.description import package_versions
from dscore_plugin.bench.cells import Cell, Place
from dscore_plugin.bench.hardware import hardware_name
from dscore_plugin.errors import BenchError
from dscore_plugin.files import read_json, write_json
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.precision import choose_precision

Record = dict[str, Any]
Options = frozenset[str]
STAGES = ("pruned", "recalibrated", "finetuned")
NEEDED = (
    "id", "row", "model", "criterion", "granularity", "allocation", "target_macs", "macs_kept", "seed", "epochs",
    "rounds", "distill", "weights", "top1_dense", *(f"top1_{stage}" for stage in STAGES), "hardware", "command",
)  # fmt: skip
_ASIDE = ("model", "weights", "target-macs", "seed", "out", "sensitivity")  # options: fields, or paths
_SCHEDULE = {item.name.replace("_", "-") for item in fields(TrainingConfig)} | {
    "data", "rounds", "round-epochs", "no-recalibrate",
}  # fmt: skip


def finished_record(
    cell: Cell,
    place: Place,
    metrics: Mapping[str, Any],
    *,
    test_images: int,
    seconds: float | None,
    sensitivity_seconds: float | None = None,
) -> Record:
    """Write down a cell that ran.

    Args:
        cell: which one.
        place: where it ran.
        metrics: of the run, as ``metrics.json`` has them.
        test_images: how many the accuracies were measured on.
        seconds: the whole run took; None where an interruption hides it.
        sensitivity_seconds: the sensitivity table took, in whichever cell needed it first; None without one.

    Returns:
        The record, ready for JSON. Accuracies are percentages, latencies milliseconds for a whole batch.
    """
    dense, pruned = metrics["dense"], metrics["pruned"]
    return {
        **_head(cell, place),
        **shares_kept(*((numbers["macs"], numbers["params"]) for numbers in (dense, pruned))),
        "macs_dense": dense["macs"],
        "params_dense": dense["params"],
        **{f"top1_{stage}": _top1(metrics.get(stage)) for stage in ("dense", *STAGES)},
        "validation_top1": metrics["validation_top1"],
        "test_images": test_images,
        "latency_ms": {
            batch: {"dense": dense["latency_ms"][batch], "pruned": entry}
            for batch, entry in pruned["latency_ms"].items()
        },
        "scoring_seconds": metrics["scoring_seconds"],
        "sensitivity_seconds": sensitivity_seconds,
        "seconds": seconds,
        **_tail(cell, place),
    }


def shares_kept(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Return how much is left of the MACs and the parameters, which ``before`` and ``after`` hold in this order."""
    names = ("macs_kept", "params_kept")
    return {name: round(now / then, 4) for name, then, now in zip(names, before, after, strict=True)}


def failed_record(cell: Cell, place: Place, reason: str) -> Record:
    """Write down a cell that failed: the same fields, its numbers null, and ``failed`` with the reason."""
    numbers = ("macs_kept", "params_kept", "top1_dense", *(f"top1_{stage}" for stage in STAGES))
    return {**_head(cell, place), **dict.fromkeys(numbers), "failed": reason, **_tail(cell, place)}


def read_records(path: str | Path) -> list[Record]:
    """Read a results file.

    Raises:
        BenchError: if it holds no list of records.
        ArtifactError: if it is missing or no JSON.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise BenchError(f"{path} holds a {type(content).__name__}; expected a list of cells (dscore bench)")
    for entry in content:
        missing = [name for name in NEEDED if not isinstance(entry, dict) or name not in entry]
        if missing:
            raise BenchError(f"{path} has a cell without {missing[0]!r}; expected results of dscore bench")
    return content


def add_records(path: Path, records: Iterable[Record]) -> None:
    """Write records into a results file; each takes the place of an earlier one of the same cell and weights."""
    kept = {key(entry): entry for entry in (read_records(path) if path.exists() else [])}
    kept |= {key(entry): entry for entry in records}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, list(kept.values()))


def key(record: Mapping[str, Any]) -> tuple[str, str]:
    """Return what tells records apart: the cell, and the weights it began with."""
    return record["id"], record["weights"]["sha256"]


def options(record: Record) -> Options:
    """Return what a record's command asks for, such as ``"mixup 0.2"``: the same for runs that may be compared.

    The network, the target and the seed have fields of their own; they and all paths are left out.
    """
    written = str(record["command"]).split(" --")[1:]
    without_path = (text.partition(":")[0] if text.startswith("data ") else text for text in written)
    return frozenset(option for option in without_path if name_of(option) not in _ASIDE)


def schedule(found: Options) -> Options:
    """Return those of some options that belong to the training, not to the choice of what leaves."""
    return frozenset(words for words in found if name_of(words) in _SCHEDULE)


def name_of(option: str) -> str:
    """Return the name of an option, without its value."""
    return option.partition(" ")[0]


def finished(records: Iterable[Record]) -> list[Record]:
    """Return the records of cells that ran to their end."""
    return [record for record in records if not record.get("failed")]


def of_weights(records: Sequence[Record], digest: str | None) -> dict[str, Record]:
    """Return the records of cells by id, of those that began with these weights; None takes the last of each."""
    return {
        record["id"]: record for record in records if digest is None or record["weights"]["sha256"] == digest
    }


def _head(cell: Cell, place: Place) -> Record:
    return {
        "id": cell.id,
        "protocol": cell.protocol.name,
        "row": cell.row,
        "model": cell.protocol.model,
        "data": cell.protocol.data,
        "weights": {"file": cell.protocol.weights, "sha256": place.digest},
        "criterion": cell.info.name,
        "granularity": cell.choice().unit,
        "allocation": cell.allocation,
        "target_macs": cell.target_macs,
        "seed": cell.seed,
        "epochs": cell.epochs,
        "rounds": cell.block.rounds,
        "round_epochs": cell.block.round_epochs,
        "distill": cell.distill,
    }


def _tail(cell: Cell, place: Place) -> Record:
    device = place.source(cell.protocol.model, cell.seed).find_device()
    precision = choose_precision(str(cell.training.get("precision", "auto")), device)
    return {
        "hardware": hardware_name(device),
        "precision": "bfloat16" if precision.bfloat16 else "float32",
        "command": cell.command(place.data),
        "versions": package_versions(),
    }


def _top1(stage: Mapping[str, Any] | None) -> float | None:
    return None if stage is None else round(stage["top1"], 2)
