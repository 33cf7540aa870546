"""Discrimination-aware channel pruning of a whole network: DCP and DCP-Adapt.

Source: Zhuang et al., *Discrimination-aware Channel Pruning for Deep Neural Networks*, arXiv 1810.11809; where the
paper is silent, its authors' code. docs/criteria.md lists the readings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dscore_plugin.datasets import ImageData, ImageSet
from dscore_plugin.errors import CriterionError, DataError, ModelError
from dscore_plugin.groups import ChannelGroup, ScoredGroup
from dscore_plugin.plan import Plan, fingerprint
from dscore_plugin.selection.discrimination_run import Run, TuningData, Work
from dscore_plugin.selection.discrimination_settings import DiscriminationAwareSettings
from dscore_plugin.selection.layer_candidates import Candidate, candidates
from dscore_plugin.selection.processes import Processes
from dscore_plugin.selection.selector import Request
from dscore_plugin.training.batches import count_steps, load_batches, shuffled_batches, stream_seed
from dscore_plugin.training.head_places import find_segments
from dscore_plugin.training.heads import Batch
from dscore_plugin.training.progress import NoProgress, Progress

ADAPT = "adapt"  # the goal of a request that leaves the number of channels to the stop rule
_SHUFFLE = 3  # stream of random numbers


@dataclass(frozen=True)
class DiscriminationAwareSelector(DiscriminationAwareSettings):
    """DCP (``adapt=False``) and DCP-Adapt (``adapt=True``).

    The network is changed: with ``head_epochs`` it is fine-tuned together with its heads, and in any case the layers
    behind pruned channels are optimised, their other inputs set to zero. The plan is made for these weights: removal
    leaves the network that was optimised. Until then norms that average over channels still count those that leave, so
    that only networks without such norms compute the same before and after it. A convolution that standardises its
    weights (timm's ``StdConv2d``) is the exception: it is optimised with zeros among them, and they leave, too.

    With ``adapt`` the stop rule decides how many channels stay; a goal in the request is then the most that may leave
    each layer, and the goal ``"adapt"`` sets no such limit (one unit stays).

    Attributes: those of :class:`~dscore_plugin.selection.discrimination_settings.DiscriminationAwareSettings`.
    """

    def check(self, granularity: str) -> None:
        """Refuse another granularity than ``"channel"``; raise CriterionError."""
        if granularity != "channel":
            raise CriterionError(f"dcp chooses channels, not {granularity}s; leave the granularity out")

    def select(self, model: nn.Module, data: ImageData, request: Request) -> Plan:
        """Choose the input channels of every convolution that alone reads a group of channels.

        Args:
            model: the network; trained as the class says.
            data: the training images are used.
            request: granularity ``"channel"``; any goal that gives every group a number, and ``"adapt"``.

        Raises:
            CriterionError: if the request or an option does not fit.
            ModelError: if there is nothing to choose, the weights are not float32, the network gives no logits, or
                several processes run.
        """
        self.check(request.granularity)
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
        if self.head_epochs and tuning is not None and tuning.steps < 1:
            raise DataError(
                "dcp needs training images to fine-tune on; got no batch: pass more, or head_epochs=0"
            )
        if self.head_epochs and tuning is None:
            raise DataError(
                f"head_epochs={self.head_epochs} needs training images; pass tuning=, or head_epochs=0"
            )
        types = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}
        other = next((name for name, dtype in types.items() if dtype != torch.float32), None)
        if other is not None:
            raise ModelError(
                f"dcp optimises float32 weights, and {other!r} is {types[other]}; call model.float()"
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
