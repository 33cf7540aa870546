"""What a training run is asked to do, and the learning rate that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dscore_plugin.errors import TrainingError, did_you_mean

Schedule = Literal["cosine", "steps", "constant"]
PrecisionName = Literal["auto", "float32", "bfloat16"]
TrackerName = Literal["tensorboard", "wandb"]
NO_EFFECT = ("workers", "validate_every", "track")  # fields that change no weight


@dataclass(frozen=True)
class TrainingConfig:
    """Stochastic gradient descent with a learning rate that is a pure function of the step.

    Args:
        epochs: passes over the training images, at least 1.
        learning_rate: the peak, reached after the warm-up.
        momentum: in ``[0, 1)``; 0 is plain gradient descent.
        nesterov: Nesterov's momentum; needs ``momentum > 0``.
        weight_decay: L2 penalty on every trainable parameter.
        schedule: ``"cosine"`` falls to zero over the run, ``"steps"`` multiplies by ``gamma`` at each
            milestone, ``"constant"`` stays.
        milestones: completed epochs after which ``"steps"`` multiplies; increasing.
        gamma: the factor of ``"steps"``.
        warmup_epochs: epochs (a fraction is allowed) of linear rise to ``learning_rate``.
        label_smoothing: in ``[0, 1)``.
        distill: share of the teacher's soft targets in the loss, in ``[0, 1]``; see
            :class:`~dscore_plugin.training.distillation.Teacher`. 0 needs no teacher.
        distill_temperature: of the soft targets, above 0.
        distill_features: weight of the teacher's attention maps; 0 leaves them out.
        mixup: alpha of mixup: each image is blended with a partner, by a share drawn from Beta(alpha, alpha) for the
            whole batch; 0 leaves it out.
        cutmix: alpha of cutmix: a box of the partner is pasted in; 0 leaves it out. With both, each batch is mixed
            one way or the other, as often. Both need an even ``batch_size``; of an odd last batch one image is
            left out.
        ema: decay of the moving average of the weights, in ``[0, 1)``, warmed up as by timm: after ``n`` steps it is at
            most ``1 - n^(-2/3)``. The average is what is evaluated, and what the model has in the end. 0 leaves it
            out.
        batch_size: the global batch, over all processes and parts.
        accumulate: parts that each process divides its share of a batch into, and runs through the model one after the
            other, where memory is small; the gradients are added up. Batch norm sees the parts.
        precision: ``"auto"`` takes bfloat16 autocast where the hardware gains from it.
        seed: of the order of the images and of all random numbers.
        validate_every: epochs between two evaluations; the last epoch is always evaluated.
        workers: loader processes (per training process); the result does not depend on them.
        track: write the history to ``"tensorboard"`` or ``"wandb"``, too; None does not.

    Raises:
        TrainingError: if a value is out of range, or two values contradict each other.
    """

    epochs: int
    learning_rate: float = 0.02
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_epochs: float = 0
    label_smoothing: float = 0.0
    distill: float = 0.0
    distill_temperature: float = 4.0
    distill_features: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    batch_size: int = 128
    accumulate: int = 1
    precision: PrecisionName = "auto"
    seed: int = 0
    validate_every: int = 1
    workers: int = 0
    track: TrackerName | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))  # JSON gives a list
        self._check_choices()
        self._check_ranges()
        self._check_schedule()

    @property
    def distils(self) -> bool:
        """Whether the run needs a teacher."""
        return self.distill > 0 or self.distill_features > 0

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0

    def _check_choices(self) -> None:
        choices_of = {"schedule": get_args(Schedule), "precision": get_args(PrecisionName)}
        if self.track is not None:
            choices_of["track"] = get_args(TrackerName)
        for name, choices in choices_of.items():
            value = getattr(self, name)
            if value not in choices:
                hint = did_you_mean(str(value), choices)
                raise TrainingError(f"{name}={value!r} is unknown; expected {' or '.join(choices)}{hint}")

    def _check_ranges(self) -> None:
        lowest_of = {"epochs": 1, "batch_size": 1, "accumulate": 1}
        lowest_of |= {"validate_every": 1, "seed": 0, "workers": 0}
        for name, lowest in lowest_of.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise TrainingError(f"{name}={value!r} is not valid; expected a whole number >= {lowest}")
        ranges = {
            "learning_rate": (0 < self.learning_rate < math.inf, "a number > 0"),
            "momentum": (0 <= self.momentum < 1, "a number in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "a number >= 0"),
            "gamma": (0 < self.gamma <= 1, "a number in (0, 1]"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "a number in [0, 1)"),
            "distill": (0 <= self.distill <= 1, "a number in [0, 1]"),
            "distill_temperature": (0 < self.distill_temperature < math.inf, "a number > 0"),
            "distill_features": (0 <= self.distill_features < math.inf, "a number >= 0"),
            "mixup": (0 <= self.mixup < math.inf, "a number >= 0"),
            "cutmix": (0 <= self.cutmix < math.inf, "a number >= 0"),
            "ema": (0 <= self.ema < 1, "a number in [0, 1)"),
            "warmup_epochs": (0 <= self.warmup_epochs < self.epochs, "a number >= 0 and less than epochs"),
        }
        for name, (valid, expected) in ranges.items():
            if not valid:
                raise TrainingError(f"{name}={getattr(self, name)!r} is not valid; expected {expected}")
        if self.nesterov and self.momentum == 0:
            raise TrainingError("nesterov=True needs momentum > 0; set momentum=0.9 or nesterov=False")
        if self.mixes and self.batch_size % 2:
            raise TrainingError(
                f"batch_size={self.batch_size} is odd; mixup and cutmix pair images: make it even"
            )
        if self.accumulate > self.batch_size:
            raise TrainingError(
                f"accumulate={self.accumulate} is not valid; expected at most batch_size={self.batch_size}"
            )

    def _check_schedule(self) -> None:
        if self.schedule != "steps" and self.milestones:
            raise TrainingError(
                f"milestones={self.milestones} mean nothing to schedule={self.schedule!r}; "
                f"use schedule='steps'"
            )
        rising = all(a < b for a, b in zip((0, *self.milestones), self.milestones, strict=False))
        if self.schedule == "steps" and not (self.milestones and rising):
            raise TrainingError(
                f"milestones={self.milestones} are not valid; schedule='steps' expects increasing epochs >= 1"
            )


def learning_rate_at(config: TrainingConfig, step: int, steps_per_epoch: int) -> float:
    """Give the learning rate of one optimiser step.

    Args:
        config: the run.
        step: optimiser steps taken before this one, over all epochs.
        steps_per_epoch: optimiser steps in one epoch.

    Returns:
        The learning rate; the same for the same arguments, whatever was trained before.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.learning_rate * ((step + 1) / warmup)
    if config.schedule == "cosine":
        done = (step - warmup) / (config.epochs * steps_per_epoch - warmup)
        return config.learning_rate * (1 + math.cos(math.pi * done)) / 2
    passed = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
    return config.learning_rate * config.gamma**passed
