"""Small images of one size: digits, CIFAR, SVHN. A batch is cut, flipped and normalised in one go."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from dscore_plugin.datasets.draws import hold_out, random_table
from dscore_plugin.datasets.image_set import ImageData, training_and_validation, whole
from dscore_plugin.datasets.reading import PACKED, PACKED_SHAPE, as_given, download, optional, read
from dscore_plugin.errors import DataError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIGITS_MEAN, DIGITS_STD = (0.3053,), (0.3760,)

_DIGITS_TEST_FRACTION = 0.2
_PACKED_SHIFT = 4


@dataclass(frozen=True)
class _Form:
    """How bytes become what a network sees.

    Attributes:
        white: the pixel value that counts as 1 before normalisation.
        mean: per channel.
        std: per channel.
        shift: augmentation moves an image by up to so many pixels each way and fills in black.
        flip: whether augmentation mirrors every second image.
        image_size: height and width to resize to; None leaves the images' own.
    """

    white: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shift: int
    flip: bool
    image_size: int | None


@dataclass(frozen=True)
class _PackedImages:
    """Small images of one size, kept as bytes and decoded at the first use.

    Attributes:
        decode: gives the pixels, uint8, ``(N, C, H, W)``.
        labels: ``(N,)``, int64.
        form: how they are augmented and normalised.
    """

    decode: Callable[[], Tensor]
    labels: Tensor
    form: _Form

    @functools.cached_property
    def pixels(self) -> Tensor:
        return self.decode()

    def plain(self, indices: Tensor) -> Tensor:
        return self._normalise(self.pixels[indices])

    def augmented(self, indices: Tensor, seed: int, epoch: int) -> Tensor:
        highs = (2 * self.form.shift + 1, 2 * self.form.shift + 1, 2 if self.form.flip else 1)
        draws = torch.from_numpy(random_table(seed, epoch, len(self.labels), highs)[indices.numpy()])
        top, left, mirrored = draws.unbind(1)
        return self._normalise(
            _crop_and_flip(self.pixels[indices], top, left, mirrored.bool(), self.form.shift)
        )

    def _normalise(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.form.mean, self.form.std))
        images = pixels.float().div_(self.form.white).sub_(mean).div_(std)
        if self.form.image_size in (None, images.shape[-1]):
            return images
        size = (self.form.image_size, self.form.image_size)
        return functional.interpolate(images, size, mode="bilinear", antialias=True)


def _crop_and_flip(pixels: Tensor, top: Tensor, left: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """Pad images with black, cut each one to its size again at its own place, and mirror some.

    Args:
        pixels: ``(B, C, H, W)``, any dtype.
        top: first row of each cut in the padded image, ``(B,)``, 0 to ``2 * padding``.
        left: first column likewise.
        mirrored: which images are flipped from left to right, ``(B,)``, bool.
        padding: pixels on each side.

    Returns:
        Images of the same shape and dtype.
    """
    batch, channels, height, width = pixels.shape
    padded = functional.pad(pixels, (padding,) * 4)
    columns = torch.arange(width).expand(batch, width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns) + left[:, None]
    rows = torch.arange(height) + top[:, None]
    places = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    places = places.view(batch, 1, height * width).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, places).view(pixels.shape)


def load_digits(validation_fraction: float, seed: int, image_size: int | None) -> ImageData:
    """Split scikit-learn's 1,797 digits: a fifth is the test set, the same for every seed."""
    digits = optional("sklearn.datasets").load_digits()
    labels = torch.from_numpy(digits.target).long()
    pixels = torch.from_numpy(digits.images).to(torch.uint8)[:, None]
    names = tuple(str(name) for name in digits.target_names)
    form = _Form(16.0, DIGITS_MEAN, DIGITS_STD, shift=1, flip=False, image_size=image_size)
    rest, test = (
        _PackedImages(functools.partial(as_given, pixels[part]), labels[part], form)
        for part in hold_out(labels, _DIGITS_TEST_FRACTION, seed=0)
    )
    train, validation = training_and_validation(rest, validation_fraction, seed)
    side = image_size or pixels.shape[-1]
    return ImageData("digits", train, validation, whole(test, seed), len(names), (1, side, side), names)


def load_packed(
    name: str, path: Path | None, validation_fraction: float, seed: int, image_size: int | None
) -> ImageData:
    """Load CIFAR or SVHN, from a folder or through torchvision."""
    known = PACKED[name]
    splits = download(name, known) if path is None else read(name, known, path)
    for part, split in zip(("training", "test"), splits, strict=True):
        _check_labels(split.labels, known.num_classes, f"the {part} images of {name!r}")
    form = _Form(255.0, IMAGENET_MEAN, IMAGENET_STD, _PACKED_SHIFT, known.flip, image_size)
    rest, test = (_PackedImages(split.decode, split.labels, form) for split in splits)
    train, validation = training_and_validation(rest, validation_fraction, seed)
    side = image_size or PACKED_SHAPE[-1]
    return ImageData(
        name, train, validation, whole(test, seed), known.num_classes, (3, side, side), splits[0].class_names
    )


def _check_labels(labels: Tensor, num_classes: int, what: str) -> None:
    if not len(labels):
        raise DataError(f"{what} are none; expected at least one: look whether the files are complete")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise DataError(
            f"{what} have labels {lowest} to {highest}; expected 0 to {num_classes - 1}: another data set?"
        )
