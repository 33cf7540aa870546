"""One choice of channels for a whole network: stage by stage, layer by layer, with checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dscore_plugin.files import atomic_folder
from dscore_plugin.groups import ChannelGroup
from dscore_plugin.masking import masked
from dscore_plugin.selection.discrimination_settings import DiscriminationAwareSettings
from dscore_plugin.selection.greedy_channels import Chosen, GreedySelection, LayerTask
from dscore_plugin.selection.journal import Journal
from dscore_plugin.selection.layer_candidates import Candidate
from dscore_plugin.training.batches import stream_seed
from dscore_plugin.training.head_places import Segment
from dscore_plugin.training.heads import Batch, Heads, Losses, frozen_copy, train_heads
from dscore_plugin.training.progress import Progress

_WEIGHT = "weight.safetensors"


@dataclass(frozen=True)
class TuningData:
    """What the heads are trained on.

    Attributes:
        batches: gives the batches of an epoch, counted from 0.
        steps: batches in an epoch.
        images: images in an epoch.
    """

    batches: Callable[[int], Iterable[Batch]]
    steps: int
    images: int

    @staticmethod
    def of(batches: Sequence[Batch]) -> TuningData:
        """Take the same batches in every epoch."""
        return TuningData(lambda _: batches, len(batches), sum(len(labels) for _, labels in batches))


@dataclass
class Run:
    """One choice for a whole network."""

    settings: DiscriminationAwareSettings
    model: nn.Module
    example_inputs: tuple[Any, ...]
    found: Mapping[str, Candidate]
    keep: Mapping[str, int]
    batches: Sequence[Batch]
    tuning: TuningData | None
    seed: int
    work: Work | None
    progress: Progress
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.orders: dict[str, tuple[int, ...]] = {}

    def stage(self, number: int, segments: Sequence[Segment]) -> None:
        """Train the heads of some segments, and choose for the layers in them."""
        heads = Heads(segments, self.model, self.example_inputs, self.seed)
        self._train(number, heads, segments)
        reference, gone = frozen_copy(self.model), self._gone()
        tasks = [self._task(layer, segment.end) for segment in segments for layer in segment.layers]
        open_tasks = [task for task in tasks if not self._is_settled(task)]
        if not open_tasks:
            return
        greedy = GreedySelection(
            reference, self.model, heads, self.batches, self.settings.greedy, self.settings.memory_limit,
            (gone, self._gone()),
        )  # fmt: skip
        steps = sum(task.size if self.settings.adapt else task.keep for task in open_tasks)
        with self.progress.task("choosing channels", steps) as advance:
            for task in open_tasks:
                chosen = greedy.choose(task, advance)
                if self.work:
                    self.work.add(task.layer, chosen)
                self._take(task.layer, chosen.order, chosen.weight)
                self.say(f"{task.layer}: {len(chosen.order)} of {task.size} inputs stay")

    def _train(self, number: int, heads: Heads, segments: Sequence[Segment]) -> None:
        settings, tuning = self.settings, self.tuning
        with_network = bool(settings.head_epochs) and tuning is not None
        if not with_network or tuning is None:
            tuning, losses = TuningData.of(self.batches), Losses.alone(heads)
        else:
            losses = Losses.by_depth(segments) if settings.order == "single" else Losses.equal(heads)
        with masked(self.model, self._gone()):  # what left in an earlier stage gets no gradient
            train_heads(
                self.model, heads, tuning.batches, tuning.steps, settings.tuning_config(stream_seed(self.seed, number)),
                losses, images=tuning.images, checkpoint=self.work.folder / f"heads{number}" if self.work else None,
                progress=self.progress,
            )  # fmt: skip

    def _gone(self) -> list[tuple[ChannelGroup, list[int]]]:
        """Return the units that have left so far."""
        return [
            (c.group, [unit for unit in range(c.group.units) if unit not in self.orders[c.group.name]])
            for c in self.found.values()
            if c.group.name in self.orders
        ]

    def _task(self, layer: str, end: str) -> LayerTask:
        candidate = self.found[layer]
        return LayerTask(layer, candidate.units, end, self.keep[candidate.group.name], candidate.group)

    def _is_settled(self, task: LayerTask) -> bool:
        """Take up what was chosen before the run was interrupted, and leave alone what keeps everything."""
        saved = self.work.find(task.layer) if self.work else None
        if saved is not None:
            self._take(task.layer, *saved)
        elif task.keep == task.size:
            self.orders[self.found[task.layer].group.name] = tuple(range(task.size))
        return saved is not None or task.keep == task.size

    def _take(self, layer: str, order: tuple[int, ...], weight: Tensor) -> None:
        self.orders[self.found[layer].group.name] = order
        with torch.no_grad():
            self.model.get_submodule(layer).weight.copy_(weight)  # type: ignore[operator]


class Work:
    """What is finished, on the disk: one folder with the weight for each layer, and a journal of the choices."""

    def __init__(self, work: Path, identity: Mapping[str, Any]) -> None:
        self.folder = work / "dcp"
        self._journal = Journal(self.folder / "layers.jsonl")
        records = self._journal.begin(identity, resume=True)
        self._known = {
            record["layer"]: (place, tuple(record["order"])) for place, record in enumerate(records)
        }

    def find(self, layer: str) -> tuple[tuple[int, ...], Tensor] | None:
        """Return the order and the weight of a layer that was finished, or None."""
        if layer not in self._known:
            return None
        place, order = self._known[layer]
        return order, load_file(self.folder / f"layer{place}" / _WEIGHT)["weight"]

    def add(self, layer: str, chosen: Chosen) -> None:
        """Keep what was chosen for a layer: the weight first, then the line that says it is there."""
        place = len(self._known)
        with atomic_folder(self.folder / f"layer{place}", force=True) as folder:
            save_file({"weight": chosen.weight.cpu().contiguous()}, folder / _WEIGHT)
        self._journal.add({"layer": layer, "order": list(chosen.order), "losses": list(chosen.losses)})
        self._known[layer] = (place, chosen.order)
