"""Labelled images, normalised, one by one or as ready batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dscore_plugin.datasets.draws import ORDER, SUBSET, hold_out, ranks_within_class
from dscore_plugin.errors import DataError


class ImageSource(Protocol):
    """Where the images of a set come from; index ``i`` is the i-th image of the source."""

    @property
    def labels(self) -> Tensor:
        """The class of every image, ``(N,)``, int64."""

    def plain(self, indices: Tensor) -> Tensor:
        """Give images as they are, normalised: float32, shape ``(B, C, H, W)``."""

    def augmented(self, indices: Tensor, seed: int, epoch: int) -> Tensor:
        """Give images in the form that they take in an epoch, normalised: float32, ``(B, C, H, W)``."""


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Labelled images, normalised, one by one or as ready batches.

    Args:
        source: where the images come from.
        indices: which images of the source belong to the set, ``(n,)``, int64.
        augmented: whether they are augmented, as a pure function of (``seed``, epoch, index in the source).
        seed: of the augmentation.

    Attributes:
        epoch: set by :meth:`set_epoch`; 0 at first.
    """

    def __init__(
        self, source: ImageSource, indices: Tensor, *, augmented: bool = False, seed: int = 0
    ) -> None:
        self.source = source
        self.indices = indices
        self.augmented = augmented
        self.seed = seed
        self.epoch = 0

    @property
    def labels(self) -> Tensor:
        """The class of every image, ``(n,)``, int64."""
        return self.source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.__getitems__([index])
        return images[0], int(labels[0])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Give a ready batch.

        Args:
            indices: places in this set.

        Returns:
            Images ``(B, C, H, W)``, float32, normalised, and labels ``(B,)``, int64.

        Raises:
            IndexError: if there is no such place.
            DataError: if an image cannot be read.
        """
        chosen = self.indices[torch.as_tensor(indices, dtype=torch.int64)]
        labels = self.source.labels[chosen]
        if self.augmented:
            return self.source.augmented(chosen, self.seed, self.epoch), labels
        return self.source.plain(chosen), labels

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, whose augmentation and order the next batches follow."""
        self.epoch = epoch

    def plain(self) -> ImageSet:
        """Give the same images without augmentation."""
        return ImageSet(self.source, self.indices, seed=self.seed)

    def subset(self, n: int, seed: int = 0) -> ImageSet:
        """Choose ``n`` images, as many of each class as far as there are enough.

        Args:
            n: how many.
            seed: of the choice.

        Returns:
            A set with the same augmentation, in the same order.

        Raises:
            DataError: if ``n`` is less than 1 or more than there are.
        """
        if not 1 <= n <= len(self):
            raise DataError(f"a subset of {n} images cannot be had; expected 1 to {len(self)}")
        rng = np.random.default_rng([seed, SUBSET])
        ranks = ranks_within_class(self.labels.numpy(), rng)
        rounds = np.lexsort((rng.random(len(self)), ranks))  # the first of every class, then the second, ...
        chosen = torch.from_numpy(np.sort(rounds[:n]))
        smaller = ImageSet(self.source, self.indices[chosen], augmented=self.augmented, seed=self.seed)
        smaller.set_epoch(self.epoch)
        return smaller

    def loader(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        workers: int = 0,
        drop_last: bool = False,
    ) -> DataLoader[Any]:
        """Load the set in batches.

        Args:
            batch_size: images at a time.
            shuffle: whether to change the order, as a pure function of (``seed``, epoch): call
                :meth:`set_epoch` before each epoch.
            seed: of the order.
            workers: processes that read images; 0 reads them here.
            drop_last: whether to leave out a last batch that is not full.

        Returns:
            A loader of ``(images (B, C, H, W), labels (B,))``.
        """
        return DataLoader(
            self,
            batch_size=batch_size,
            sampler=_ShuffledOrder(self, seed) if shuffle else None,
            num_workers=workers,
            drop_last=drop_last,
            collate_fn=_as_they_are,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else the loader draws from the global random numbers
        )


@dataclass(frozen=True)
class ImageData:
    """A data set: three disjoint sets of images, and what a network must know of them.

    Attributes:
        name: e.g. ``"cifar10"``.
        train: augmented.
        validation: plain; held out of the training images where the data set brings none.
        test: plain.
        num_classes: labels are 0 to ``num_classes - 1``.
        input_shape: ``(C, H, W)``.
        class_names: one for each label.
    """

    name: str
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    num_classes: int
    input_shape: tuple[int, int, int]
    class_names: tuple[str, ...]


def training_and_validation(source: ImageSource, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Hold a validation set out of training images; only what stays is augmented."""
    kept, held_out = hold_out(source.labels, fraction, seed)
    return ImageSet(source, kept, augmented=True, seed=seed), ImageSet(source, held_out, seed=seed)


def whole(source: ImageSource, seed: int, *, augmented: bool = False) -> ImageSet:
    """Return all images of a source."""
    return ImageSet(source, torch.arange(len(source.labels)), augmented=augmented, seed=seed)


class _ShuffledOrder(Sampler[int]):
    """The order of an epoch, as a pure function of the seed and of the set's epoch."""

    def __init__(self, images: ImageSet, seed: int) -> None:
        self.images = images
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.images.epoch, ORDER])
        return iter(rng.permutation(len(self.images)).tolist())


def _as_they_are(batch: Any) -> Any:
    return batch
