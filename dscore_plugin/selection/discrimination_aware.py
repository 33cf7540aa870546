"""Discrimination-aware channel pruning of a whole network: DCP and DCP-Adapt.

Source: Zhuang et al., *Discrimination-aware Channel Pruning for Deep Neural Networks*, arXiv 1810.11809; where the
paper is silent, its authors' code. docs/criteria.md lists the readings.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dscore_plugin.criteria.discrimination_aware import check_reading
from dscore_plugin.datasets import ImageData, ImageSet
from dscore_plugin.errors import CriterionError, DataError, ModelError, did_you_mean
from dscore_plugin.groups import ChannelGroup, ScoredGroup
from dscore_plugin.plan import Plan, fingerprint
from dscore_plugin.selection.discrimination_run import Run, TuningData, Work
from dscore_plugin.selection.greedy_channels import GreedyOptions
from dscore_plugin.selection.layer_candidates import Candidate, candidates
from dscore_plugin.selection.processes import Processes
from dscore_plugin.selection.selector import Request
from dscore_plugin.training.batches import count_steps, load_batches, shuffled_batches, stream_seed
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.head_places import find_segments
from dscore_plugin.training.heads import Batch
from dscore_plugin.training.progress import NoProgress, Progress

ORDERS = ("single", "stages")
ADAPT = "adapt"  # the goal of a request that leaves the number of channels to the stop rule
_SHUFFLE = 3  # stream of random numbers


@dataclass(frozen=True)
class DiscriminationAwareSelector:
    """DCP (``adapt=False``) and DCP-Adapt (``adapt=True``).

    The network is changed: with ``head_epochs`` it is fine-tuned together with its heads, and in any case the layers
    behind pruned channels are optimised, their other inputs set to zero. The plan is made for these weights, so that
    removal does not change what the network computes.

    With ``adapt`` the stop rule decides how many channels stay; a goal in the request is then the most that may leave
    each layer, and the goal ``"adapt"`` sets no such limit (one unit stays).

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

    def select(self, model: nn.Module, data: ImageData, request: Request) -> Plan:
        """Choose the input channels of every convolution that alone reads a group of channels.

        Args:
            model: the network; trained as the class says.
            data: the training images are used.
            request: granularity ``"channel"``; any goal that gives every group a number, and ``"adapt"``.

        Raises:
            CriterionError: if the request or an option does not fit.
            ModelError: if there is nothing to choose, the network gives no logits, or several processes run.
        """
        if request.granularity != "channel":
            raise CriterionError(
                f"dcp chooses channels, not {request.granularity}s; leave the granularity out"
            )
        if request.goal == ADAPT and not self.adapt:
            raise CriterionError("without a ratio or a budget only dcp_adapt knows how many channels leave")
        graph = request.trace(model)
        found = candidates(model, request.example_inputs, request.groups(graph))
        placeholders = [ScoredGroup(c.group, torch.arange(c.group.units, dtype=torch.float64)) for c in found]
        if request.goal == ADAPT:
            most = {c.group.name: c.group.units - 1 for c in found}
        else:
            most = request.allot(graph, placeholders)
        keep = {c.group.name: c.group.units - most[c.group.name] for c in found}
        images = data.train.plain()
        images = images.subset(min(self.selection_images, len(images)), seed=request.seed)
        orders = self.choose(
            model, request.example_inputs, found, keep, selection_batches(images, self.batch_size, request.seed),
            self._tuning_data(data, request.seed), seed=request.seed, work=request.work, progress=request.progress,
            say=request.say,
        )  # fmt: skip
        scored = [
            replace(item, scores=_order_scores(item.group, orders[item.group.name])) for item in placeholders
        ]
        counts = {item.group.name: item.group.units - len(orders[item.group.name]) for item in scored}
        made_by = {
            "criterion": "dcp_adapt" if self.adapt else "dcp",
            request.goal: request.amount,
            **asdict(self),
        }
        made_by |= {"seed": request.seed, "places": list(self.places)}
        return request.write(graph, scored, counts, made_by)

    def choose(
        self,
        model: nn.Module,
        example_inputs: tuple[Any, ...],
        found: Sequence[Candidate],
        keep: Mapping[str, int],
        batches: Sequence[Batch],
        tuning: TuningData | None = None,
        *,
        seed: int = 0,
        work: Path | None = None,
        progress: Progress | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> dict[str, tuple[int, ...]]:
        """Choose the units that stay, without a plan.

        Args:
            model: the network; trained as the class says.
            example_inputs: the arguments of one forward pass.
            found: from :func:`candidates`.
            keep: units that stay in each group, by its name; with ``adapt`` the fewest.
            batches: images and labels to choose by, in a fixed order.
            tuning: what the network is fine-tuned on with its heads; needed with ``head_epochs``.
            seed: of the heads' weights.
            work: a folder that takes what is finished, layer by layer; what lies there is gone on with.
            progress: shows bars.
            say: takes a line of news now and then.

        Returns:
            For each group the units that stay, in the order in which they were taken; a group that keeps all of its
            units is not touched.
        """
        self._check(model, found, batches, tuning)
        segments = find_segments(
            model, example_inputs, [c.layer for c in found], None if self.places else self.heads, self.places
        )
        identity = self._identity(model, keep, batches, seed)
        run = Run(
            self, model, example_inputs, {c.layer: c for c in found}, keep, batches, tuning, seed,
            Work(work, identity) if work else None, progress or NoProgress(), say,
        )  # fmt: skip
        stages = [segments] if self.order == "single" else [(segment,) for segment in segments]
        for number, stage in enumerate(stages):
            run.stage(number, stage)
        return run.orders

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

    def _tuning_data(self, data: ImageData, seed: int) -> TuningData:
        images = len(data.train)

        def batches(epoch: int) -> Iterable[Batch]:
            data.train.set_epoch(epoch)
            return load_batches(data.train, shuffled_batches(images, self.batch_size, seed, epoch))

        return TuningData(batches, count_steps(images, self.batch_size), images)

    def _check(
        self,
        model: nn.Module,
        found: Sequence[Candidate],
        batches: Sequence[Batch],
        tuning: TuningData | None,
    ) -> None:
        if Processes().number > 1:
            raise ModelError("dcp runs in one process; start it without accelerate launch or torchrun")
        if not found:
            raise ModelError(
                f"{type(model).__name__} has no convolution that alone reads a group of channels with one producer"
            )
        if not batches:
            raise DataError("dcp needs images and labels to choose by; got no batch")
        if self.head_epochs and tuning is None:
            raise DataError(
                f"head_epochs={self.head_epochs} needs training images; pass tuning=, or head_epochs=0"
            )
        bad = next((name for name, p in model.named_parameters() if not torch.isfinite(p).all()), None)
        if bad is not None:
            raise ModelError(f"the parameter {bad!r} holds NaN or infinity; check the checkpoint")

    def _identity(
        self, model: nn.Module, keep: Mapping[str, int], batches: Sequence[Batch], seed: int
    ) -> dict[str, Any]:
        """Say what an interrupted choice and its continuation have in common, as plain JSON values."""
        digest = hashlib.sha256()
        for images, labels in batches:
            digest.update(images[0].cpu().contiguous().numpy().tobytes() + labels.cpu().numpy().tobytes())
        options = {key: value for key, value in asdict(self).items() if key != "memory_limit"}
        content = {"model": fingerprint(model), "options": options, "keep": dict(keep), "seed": seed}
        plain: dict[str, Any] = json.loads(json.dumps({**content, "images": digest.hexdigest()}))
        return plain


def selection_batches(images: ImageSet, batch_size: int, seed: int) -> list[Batch]:
    """Return the images in batches, shuffled once: they may be stored class by class."""
    generator = torch.Generator().manual_seed(stream_seed(seed, _SHUFFLE))
    order = torch.randperm(len(images), generator=generator)
    return [images.__getitems__(part.tolist()) for part in order.split(batch_size)]


def _order_scores(group: ChannelGroup, order: Sequence[int]) -> Tensor:
    """Score units by their turn: 1 for the first that was taken, 0 for those that leave."""
    scores = torch.zeros(group.units, dtype=torch.float64)
    scores[list(order)] = 1 - torch.arange(len(order), dtype=torch.float64) / group.units
    return scores
