"""What a training run reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class EpochRecord:
    """One epoch, as it ended.

    Args:
        epoch: counted from 1.
        loss: mean loss per training image, with label smoothing, while training.
        train_top1: percent of the (augmented) training images, while training.
        validation_top1: percent, after the epoch; None where it was not evaluated.
        learning_rate: of the epoch's last step.
        seconds: wall-clock time of the epoch, evaluation included.
        regularizer: the numbers that the regulariser reported.
    """

    epoch: int
    loss: float
    train_top1: float
    validation_top1: float | None
    learning_rate: float
    seconds: float
    regularizer: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingResult:
    """A finished run: one record per epoch, those before a resume included."""

    history: tuple[EpochRecord, ...]

    @property
    def final(self) -> EpochRecord:
        """The last epoch: the one to report (no choice of the best epoch)."""
        return self.history[-1]

    def rows(self) -> list[dict[str, Any]]:
        """Give the history as plain JSON-able dictionaries, one per epoch."""
        return [asdict(record) for record in self.history]
