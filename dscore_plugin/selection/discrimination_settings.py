"""How channels are chosen by discrimination-aware pruning: plain values, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dscore_plugin.criteria.discrimination_aware import check_reading
from dscore_plugin.errors import CriterionError, did_you_mean
from dscore_plugin.selection.greedy_channels import GreedyOptions
from dscore_plugin.training.config import TrainingConfig

ORDERS = ("single", "stages")


@dataclass(frozen=True)
class DiscriminationAwareSettings:
    """What DCP (``adapt=False``) and DCP-Adapt (``adapt=True``) leave open.

    Attributes:
        adapt: stop by ``epsilon`` instead of at a given number.
        strength: lambda, the weight of the discrimination-aware loss beside the reconstruction error.
        reading: of the score: ``"kernels"``, the sum of the norms of the gradient's kernels (the authors' code), or
            ``"slice"``, the norm of all of them (the paper's text).
        channels_per_step: channels that are added between two optimisations; the paper's is 1.
        epsilon: of ``adapt``.
        selection_images: training images to choose by, without augmentation; all where there are fewer. They are held
            in memory, on the network's device.
        heads: how many; None takes 3 where there are 24 layers or more to choose for, else 2.
        places: names of the modules whose outputs the heads read, instead of ``heads``.
        head_epochs: epochs of fine-tuning the network with all losses; 0 trains the heads alone.
        head_passes: passes over the selection images where the heads are trained alone.
        head_learning_rate: None takes 0.1 for heads alone and 0.01 with the network; it is divided by 10 after 40 %
            and after 60 % of the epochs. The authors' code takes 0.1 over 100 epochs.
        order: ``"single"``: all heads are trained, then all layers pruned (the authors' code); ``"stages"``: for one
            head after the other, the network is trained with it and the layers in front of it pruned (Algorithm 1).
        learning_rate: of optimising a layer, one pass of SGD with Nesterov's momentum for each step.
        momentum: of all training.
        weight_decay: of all training.
        batch_size: of all training; its last batch may be smaller.
        memory_limit: bytes for recorded layer inputs and outputs; batches beyond it are computed every time.

    Raises:
        CriterionError: if a value is out of range.
    """

    adapt: bool = False
    strength: float = 1.0
    reading: str = "kernels"
    channels_per_step: int = 1
    epsilon: float = 0.001
    selection_images: int = 10_000
    heads: int | None = None
    places: Sequence[str] = ()
    head_epochs: int = 0
    head_passes: int = 10
    head_learning_rate: float | None = None
    order: str = "single"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch_size: int = 128
    memory_limit: int = 2 * 2**30

    def __post_init__(self) -> None:
        check_reading(self.reading)
        if self.order not in ORDERS:
            raise CriterionError(
                f"order {self.order!r} is unknown; expected {' or '.join(ORDERS)}"
                + did_you_mean(str(self.order), ORDERS)
            )
        whole = ("channels_per_step", "selection_images", "head_passes", "batch_size", "memory_limit")
        lowest = {**dict.fromkeys(whole, 1), "head_epochs": 0}
        for name, least in lowest.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise CriterionError(
                    f"{name}={value!r} is not valid; expected a whole number of {least} or more"
                )
        for name in ("strength", "epsilon", "learning_rate", "momentum", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise CriterionError(
                    f"{name}={getattr(self, name)!r} is not valid; expected a number of 0 or more"
                )

    @property
    def greedy(self) -> GreedyOptions:
        """The options of choosing a layer's channels."""
        return GreedyOptions(
            self.strength, self.reading, self.channels_per_step, self.epsilon if self.adapt else None,
            self.learning_rate, self.momentum, self.weight_decay,
        )  # fmt: skip

    def tuning_config(self, seed: int) -> TrainingConfig:
        """Return how the heads are trained, with the network or alone."""
        epochs = self.head_epochs or self.head_passes
        rate = self.head_learning_rate or (0.01 if self.head_epochs else 0.1)
        milestones = sorted({max(1, round(0.4 * epochs)), max(1, round(0.6 * epochs))})
        return TrainingConfig(
            epochs, rate, self.momentum, nesterov=self.momentum > 0, weight_decay=self.weight_decay, schedule="steps",
            milestones=tuple(milestones), batch_size=self.batch_size, seed=seed,
        )  # fmt: skip
