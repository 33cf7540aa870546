"""A benchmark small enough for a test: a CNN on scikit-learn's digits, one epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dscore_plugin.bench.cells import Place
from dscore_plugin.bench.records import Record
from dscore_plugin.models import create_model

PROTOCOL: dict[str, Any] = {
    "name": "tiny",
    "about": "two rows on digits",
    "model": "digits_cnn",
    "data": "digits",
    "weights": "digits.safetensors",
    "training": {"epochs": 1, "batch_size": 256},
    "analysis": {"images": 40, "ratios": [0.25, 0.5, 0.75]},
    "blocks": [{"name": "all rows", "rows": ["random", "l1"], "target_macs": [0.5]}],
}


def write_protocol(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.json"
    path.write_text(json.dumps({**PROTOCOL, **changes}))
    return path


def save_weights(folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / "digits.safetensors"
    save_file(create_model("digits_cnn", num_classes=10, in_chans=1).state_dict(), path)
    return path


def place(folder: Path) -> Place:
    return Place("digits", save_weights(folder), folder / "work", "cpu")


def record(row: str = "l1", *, validation: float = 80.0, finetuned: float = 70.0, **changes: Any) -> Record:
    """A record as a finished cell leaves it."""
    values: Record = {
        "row": row, "criterion": row, "granularity": "channel", "model": "cifar_resnet20", "allocation": "uniform",
        "target_macs": 0.5, "macs_kept": 0.49, "params_kept": 0.5, "macs_dense": 40_900_000, "params_dense": 269_722,
        "seed": 0, "epochs": 15, "rounds": 1, "distill": 0.0, "weights": {"file": "w", "sha256": "0" * 64},
        "top1_dense": 91.67, "top1_pruned": 20.0, "top1_recalibrated": 50.0, "top1_finetuned": finetuned,
        "validation_top1": validation, "test_images": 9827, "scoring_seconds": 0.5, "seconds": 150.0,
        "latency_ms": {b: {"dense": {"median": 4.0}, "pruned": {"median": 2.0}} for b in ("1", "64")},
        "hardware": "a processor, 2 threads", "command": "dscore prune",
    }  # fmt: skip
    values |= changes
    values["id"] = "-".join(
        str(values[key]) for key in ("row", "allocation", "target_macs", "seed", "epochs")
    )
    return values
