"""What a process is fed with, step by step: its portions of the global batches of an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from dscore_plugin.errors import DataError, TrainingError
from dscore_plugin.training.batches import (
    count_steps,
    load_batches,
    share_of,
    share_of_pairs,
    shuffled_batches,
)
from dscore_plugin.training.config import TrainingConfig

if TYPE_CHECKING:
    from dscore_plugin.datasets import ImageSet


class Portion(NamedTuple):
    """What a process runs through the model at once: its share of a global batch, or a part of the share.

    Attributes:
        images: shape ``(B, C, H, W)``.
        labels: shape ``(B,)``.
        counted: how many of them count, from the first on; the rest only fills the portion.
    """

    images: Tensor
    labels: Tensor
    counted: int


class Step(NamedTuple):
    """One global batch.

    Attributes:
        size: how many of its images count, over all processes.
        portions: those of this process, to be read once, before the next step.
    """

    size: int
    portions: Iterator[Portion]


@runtime_checkable
class ImageStream(Protocol):
    """Labelled images that come in an order of their own, without random access: shards on a disk or on the Hub."""

    def __len__(self) -> int:
        """Return how many images make an epoch, over all processes."""
        ...

    def training_batches(
        self, epoch: int, batch_size: int, *, seed: int, process: int, processes: int, workers: int
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """Give a process its part of an epoch, augmented: a pure function of the arguments.

        Only full batches ``(images (B, C, H, W), labels (B,))``, at least ``len(self) / (batch_size processes)``
        of them, rounded down.
        """
        ...

    def evaluation_batches(
        self, batch_size: int, *, process: int, processes: int, workers: int
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """Give a process its part of the images as they are; all parts together are every image once."""
        ...


class Feed(Protocol):
    """Gives a process its portions."""

    @property
    def steps(self) -> int:
        """Optimiser steps per epoch."""
        ...

    @property
    def readers(self) -> dict[str, int] | None:
        """Who reads a stream, as far as its order depends on it; None where it does not."""
        ...

    def epoch(self, epoch: int) -> Iterator[Step]:
        """Give the steps of an epoch, counted from 0."""
        ...


def make_feed(
    images: ImageSet | ImageStream, config: TrainingConfig, process: int = 0, processes: int = 1
) -> Feed:
    """Choose how a process gets its images.

    Raises:
        TrainingError: if they cannot be divided as ``config`` wants.
    """
    if isinstance(images, ImageStream):
        return _StreamFeed(images, config, process, processes)
    return _SetFeed(images, config, process, processes)


class _SetFeed:
    """Batches of a set: the order is that of one process, whatever the number of processes, parts and workers."""

    readers = None

    def __init__(self, images: ImageSet, config: TrainingConfig, process: int, processes: int) -> None:
        if config.mixes and len(images) < 2:
            raise TrainingError("mixup and cutmix pair images; expected two of them at least")
        self.images, self.config = images, config
        self.process, self.processes = process, processes

    @property
    def steps(self) -> int:
        return count_steps(len(self.images), self.config.batch_size)

    def epoch(self, epoch: int) -> Iterator[Step]:
        self.images.set_epoch(epoch)
        batches = shuffled_batches(len(self.images), self.config.batch_size, self.config.seed, epoch)
        shares = [self._shares(batch) for batch in batches]
        indices = [chosen for parts in shares for chosen, _ in parts]
        loaded = iter(load_batches(self.images, indices, workers=self.config.workers))
        for batch, parts in zip(batches, shares, strict=True):
            size = len(batch) // 2 * 2 if self.config.mixes else len(batch)
            yield Step(size, self._read(loaded, [counted for _, counted in parts]))

    @staticmethod
    def _read(loaded: Iterator[tuple[Tensor, Tensor]], counts: list[int]) -> Iterator[Portion]:
        for counted in counts:
            images, labels = next(loaded)
            yield Portion(images, labels, counted)

    def _shares(self, batch: list[int]) -> list[tuple[list[int], int]]:
        """Divide a batch, as if every part of every process were a process of its own."""
        share, parts = share_of_pairs if self.config.mixes else share_of, self.config.accumulate
        own = (part * self.processes + self.process for part in range(parts))
        return [share(batch, number, parts * self.processes) for number in own]


class _StreamFeed:
    """Batches of a stream: full ones only; what is left over at the end of an epoch is not shown."""

    def __init__(self, stream: ImageStream, config: TrainingConfig, process: int, processes: int) -> None:
        parts = processes * config.accumulate
        self.portion, rest = divmod(config.batch_size, parts)
        if rest or self.portion < 2 or (config.mixes and self.portion % 2):
            raise TrainingError(
                f"batch_size={config.batch_size} cannot be divided into {processes} processes x "
                f"accumulate={config.accumulate}; a stream needs equal parts of at least two images, and an even "
                "number with mixup or cutmix"
            )
        if len(stream) < config.batch_size:
            raise TrainingError(
                f"batch_size={config.batch_size} is not valid; the stream has {len(stream)} images only"
            )
        self.stream, self.config = stream, config
        self.process, self.processes = process, processes

    @property
    def steps(self) -> int:
        return len(self.stream) // self.config.batch_size

    @property
    def readers(self) -> dict[str, int]:
        return {"processes": self.processes, "workers": self.config.workers}

    def epoch(self, epoch: int) -> Iterator[Step]:
        loaded = iter(
            self.stream.training_batches(
                epoch,
                self.portion,
                seed=self.config.seed,
                process=self.process,
                processes=self.processes,
                workers=self.config.workers,
            )
        )
        for step in range(self.steps):
            portions = [
                Portion(images, labels, len(labels))
                for images, labels in islice(loaded, self.config.accumulate)
            ]
            if [portion.counted for portion in portions] != [self.portion] * self.config.accumulate:
                raise DataError(
                    f"the stream ended at step {step + 1} of {self.steps}, in process {self.process + 1}; check "
                    "how many images it is said to have, and that every process and worker has a shard"
                )
            yield Step(self.config.batch_size, iter(portions))
