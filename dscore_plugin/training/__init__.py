"""The training loop, evaluation, and what they share; names are imported when first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dscore_plugin.training.evaluation import Evaluation, evaluate, recalibrate_batchnorm
    from dscore_plugin.training.loop import EpochRecord, TrainingConfig, TrainingResult, train
    from dscore_plugin.training.progress import Advance, NoProgress, Progress, RichProgress
    from dscore_plugin.training.regularizer import Regularizer

__all__ = [
    "Advance",
    "EpochRecord",
    "Evaluation",
    "NoProgress",
    "Progress",
    "Regularizer",
    "RichProgress",
    "TrainingConfig",
    "TrainingResult",
    "evaluate",
    "recalibrate_batchnorm",
    "train",
]

_HOMES = {
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "recalibrate_batchnorm": "evaluation",
    "EpochRecord": "loop",
    "TrainingConfig": "loop",
    "TrainingResult": "loop",
    "train": "loop",
    "Advance": "progress",
    "NoProgress": "progress",
    "Progress": "progress",
    "RichProgress": "progress",
    "Regularizer": "regularizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
