"""What ``dscore train`` can be asked to do, and one phase of doing it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dscore_plugin.criteria.dependency_aware import MIN_CHANNELS, TRAINING_THRESHOLD
from dscore_plugin.datasets import ImageData
from dscore_plugin.errors import BudgetError, TrainingError, did_you_mean
from dscore_plugin.files import ensure_writable
from dscore_plugin.jobs import Job, Source
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.history import TrainingResult
from dscore_plugin.training.loop import train
from dscore_plugin.training.progress import Progress
from dscore_plugin.training.regularizer import Regularizer
from dscore_plugin.training.synaptic import SynapticGoal

METHODS = ("dependency_aware", "synaptic_strength")


@dataclass(frozen=True)
class SparsityGoal:
    """Where a sparsity training shall end, and how it gets there.

    Attributes:
        target: share of the scored channels to remove, in (0, 1).
        training: of the sparse phase.
        method: ``"dependency_aware"``.
        delta: step of lambda; None scales the paper's to the number of epochs.
        threshold: what counts as near zero while training, relative to a layer's maximum.
        min_channels: that every layer keeps at least.
    """

    target: float
    training: TrainingConfig
    method: str = METHODS[0]
    delta: float | None = None
    threshold: float = TRAINING_THRESHOLD
    min_channels: int = MIN_CHANNELS

    def check(self) -> None:
        """Refuse what can be refused without a model; raise a DScoreError."""
        if self.method != METHODS[0]:
            raise unknown_method(self.method)
        if not 0 < self.target < 1:
            raise BudgetError(f"target must lie between 0 and 1 (exclusive), got {self.target:g}")
        if self.min_channels < 1 or not 0 < self.threshold < 1:
            raise BudgetError(
                f"expected min_channels >= 1 and a threshold between 0 and 1, got {self.min_channels} and "
                f"{self.threshold:g}"
            )
        if self.delta is not None and not 0 < self.delta < float("inf"):
            raise TrainingError(f"delta must be a number > 0, got {self.delta:g}")


def unknown_method(name: str) -> TrainingError:
    """Say that there is no sparsity training of this name."""
    hint = did_you_mean(name, METHODS)
    return TrainingError(f"sparsity training {name!r} is unknown; expected {' or '.join(METHODS)}{hint}")


@dataclass(frozen=True)
class TrainJob(Job):
    """Everything that ``dscore train`` is asked to do.

    Attributes:
        source: network, images, and the weights to begin with, if not random ones.
        training: of the dense network; with a sparsity goal, of the retraining after the removal.
        out: the folder of the result.
        sparsity: what shall become sparse: channels, or kernels; None trains a dense network.
        force: replace an existing result.
        resume: go on with an interrupted run.
        command: the command line, for the report.
    """

    source: Source
    training: TrainingConfig
    out: Path
    sparsity: SparsityGoal | SynapticGoal | None = None
    force: bool = False
    resume: bool = False
    command: str = ""

    def check(self) -> None:
        """Refuse what can be refused before any work starts; raise a DScoreError."""
        ensure_writable(self.out, self.force)
        if self.sparsity is not None:
            self.sparsity.check()
        self.source.check()
        self.source.check_training(self.training, self.sparsity.training if self.sparsity else None)


def train_phase(
    job: TrainJob,
    model: nn.Module,
    data: ImageData,
    phase: str,
    config: TrainingConfig,
    progress: Progress,
    regularizer: Regularizer | None = None,
) -> TrainingResult:
    """Train a network in one phase of a job: ``"dense"``, ``"sparse"`` or ``"retrain"``; an interrupted one goes on."""
    return train(
        model,
        data.train,
        data.validation,
        config,
        checkpoint=job.work / phase,
        resume=job.resume,
        logs=job.logs(job.work / phase),
        regularizer=regularizer,
        device=job.source.training_device(),
        progress=progress,
    )
