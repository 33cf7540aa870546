"""Count the right answers of a network while some of its channels are silenced, reusing what the mask leaves alone.

The loops, from the outside: as many images as memory allows (all, if possible), group, count of units, batch. A
group's prefix is computed once for its images, starting from the prefix of the group before it, and then serves
every count. With all images in memory a group's counts come one after the other, in ascending order, so that a group
that has become hopeless costs nothing more; with batches outermost every hopeless group would still be measured on
part of every further batch. CIFAR-10's ResNet-56 keeps at most 192 KiB of outputs and 12 KiB of pixels for each
image, so 2,000 images take 420 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dscore_plugin.groups import ChannelGroup, ScoredGroup
from dscore_plugin.masking import masked
from dscore_plugin.selection.replay import Prefix, Recording, Replay
from dscore_plugin.training.evaluation import check_logits

if TYPE_CHECKING:
    from dscore_plugin.datasets import ImageSet

Correct = dict[int, int]  # units silenced -> images classified rightly
Batch = tuple[Tensor, Tensor]


@dataclass
class Curve:
    """One group's answers, as far as they are known.

    Attributes:
        item: the group and its scores.
        counts: how many of its units to silence: ascending, 0 left out.
        prefix: what its masks leave alone; None where that cannot be reused.
        correct: right answers over the images so far, for each count.
        open: the counts that are still measured.
    """

    item: ScoredGroup
    counts: tuple[int, ...]
    prefix: Prefix | None
    correct: Correct = field(default_factory=dict)
    open: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.open = self.counts

    @property
    def name(self) -> str:
        """The group's name."""
        return self.item.group.name

    @property
    def cost(self) -> int:
        """An estimate of the multiply-accumulates of one image, over all counts."""
        return self.prefix.macs_behind * len(self.counts) if self.prefix else 0

    def close_above(self, count: int) -> None:
        """Measure no count above ``count`` any more, and forget what is known of those."""
        self.open = tuple(c for c in self.open if c <= count)
        self.correct = {c: n for c, n in self.correct.items() if c <= count}


class Measurement:
    """Measures curves on a set of images.

    Args:
        model: in eval mode, float32; changed only while a pass runs.
        images: the set; its order is fixed.
        batch_size: images at a time.
        memory_limit: bytes for images and recorded outputs.
    """

    def __init__(self, model: nn.Module, images: ImageSet, batch_size: int, memory_limit: int) -> None:
        self._model = model
        self._images = images
        self._batch_size = batch_size
        self._memory_limit = memory_limit
        self._like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self._replay = Replay(model, first_images(images, 2)[0].to(self._like))

    def curve(self, item: ScoredGroup, counts: Sequence[int]) -> Curve:
        """Prepare the measurement of a group."""
        prefix = self._replay.prefix(silenced_modules(self._model, item.group))
        return Curve(item, tuple(sorted(set(counts) - {0})), prefix)

    def dense(self) -> int:
        """Count the right answers of the network as it is."""
        batches = (placed(batch, self._like) for batch in self._images.loader(self._batch_size))
        return sum(self._correct(batch, None) for batch in batches)

    def run(
        self,
        curves: Sequence[Curve],
        known: Mapping[tuple[str, int, int], Correct],
        found: Callable[[str, int, int, Correct], None],
        hopeless: Callable[[int, int], bool],
        advance: Callable[[int], Any],
    ) -> None:
        """Measure curves; the result is in them.

        Args:
            curves: from :meth:`curve`.
            known: from an earlier run, by group, first image and last image + 1.
            found: takes what was measured in the same form.
            hopeless: tells from the right answers so far and the images left that a group is not worth going on
                with beyond the present count.
            advance: takes the number of batches that are done with, of ``len(counts)`` passes for each curve.
        """
        curves = sorted(curves, key=lambda curve: curve.prefix.start if curve.prefix else 0)
        for start, stop, batches in self._chunks(curves):
            cache = _Cache(self._replay, batches)
            left = len(self._images) - stop
            for curve in curves:
                key = (curve.name, start, stop)
                if key not in known:
                    measured = self._measure(curve, cache, left, hopeless)
                    found(*key, measured)
                else:
                    measured = known[key]
                    _add(curve, measured, left, hopeless)
                advance(len(curve.counts) * len(batches))

    def _measure(
        self, curve: Curve, cache: _Cache, left: int, hopeless: Callable[[int, int], bool]
    ) -> Correct:
        recordings = cache.advance_to(curve.prefix)
        measured: Correct = {}
        for count in curve.open:
            with masked(self._model, [(curve.item.group, curve.item.order[:count])]):
                measured[count] = sum(map(self._correct, cache.batches, recordings))
            if hopeless(curve.correct.get(count, 0) + measured[count], left):
                break
        _add(curve, measured, left, hopeless)
        return measured

    def _correct(self, batch: Batch, recording: Recording | None) -> int:
        inputs, labels = batch
        with torch.inference_mode():
            logits = check_logits(self._replay.run(inputs, recording), labels)
            return int((logits.argmax(dim=1) == labels).sum())

    def _chunks(self, curves: Sequence[Curve]) -> Iterator[tuple[int, int, list[Batch]]]:
        """Give as many batches at a time as memory allows, with the places of their first and last + 1 image."""
        pixels = first_images(self._images, 1)[0].to(self._like).nbytes
        room = self._memory_limit // self._batch_size - pixels
        for curve in curves:
            if curve.prefix and curve.prefix.bytes_per_image > room:
                curve.prefix = None  # not even one batch of its outputs fits: compute them every time
        largest = max((c.prefix.bytes_per_image for c in curves if c.prefix), default=0)
        at_once = max(1, self._memory_limit // (self._batch_size * (pixels + largest)))
        start, batches = 0, []
        for batch in self._images.loader(self._batch_size):
            batches.append(placed(batch, self._like))
            stop = start + sum(len(labels) for _, labels in batches)
            if len(batches) == at_once or stop == len(self._images):
                yield start, stop, batches
                start, batches = stop, []


class _Cache:
    """The recordings of the present prefix, one for each batch.

    Args:
        replay: makes them.
        batches: the images.
    """

    def __init__(self, replay: Replay, batches: Sequence[Batch]) -> None:
        self._replay = replay
        self.batches = batches
        self._recordings = [Recording() for _ in batches]
        with torch.inference_mode():
            self._expected = replay.run(batches[0][0])

    def advance_to(self, prefix: Prefix | None) -> Sequence[Recording | None]:
        """Record a prefix, going on from the one before it.

        Returns:
            A recording for each batch; None for each where replaying it gives other outputs than a full pass.
        """
        if prefix is None:
            return [None] * len(self.batches)
        recorded = self._recordings
        for place, (images, _) in enumerate(self.batches):
            recorded[place] = self._replay.record(prefix, images, recorded[place])
        with torch.inference_mode():
            if self._replay.agrees(self.batches[0][0], recorded[0], self._expected):
                return recorded
        self._recordings = [Recording() for _ in self.batches]
        return [None] * len(self.batches)


def first_images(images: ImageSet, count: int) -> Batch:
    """Return the first ``count`` images and their labels, or as many as there are."""
    return images.__getitems__(list(range(min(count, len(images)))))


def _add(curve: Curve, measured: Correct, left: int, hopeless: Callable[[int, int], bool]) -> None:
    """Add what was measured on some images to a curve, and close what is hopeless."""
    for count in curve.open:
        if count not in measured:
            break
        curve.correct[count] = curve.correct.get(count, 0) + measured[count]
        if hopeless(curve.correct[count], left):
            curve.close_above(count)


def placed(batch: Batch, like: Tensor) -> Batch:
    """Bring a batch to the device and the type of ``like``, images in channels_last."""
    inputs, labels = batch
    layout = torch.channels_last if inputs.ndim == 4 else torch.preserve_format
    return inputs.to(like, memory_format=layout), labels.to(like.device)


def silenced_modules(model: nn.Module, group: ChannelGroup) -> list[nn.Module]:
    """Return the modules that a mask of the group sets to work otherwise."""
    before = {module: _workings(module) for module in model.modules()}
    with masked(model, [(group, (0,))]):
        return [module for module, workings in before.items() if _workings(module) != workings]


def _workings(module: nn.Module) -> tuple[Any, ...]:
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return (*hooks, module.__dict__.get("forward"))
