"""Folders of image files of any size, read anew each time, with ImageNet's customary transforms."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dscore_plugin.datasets.draws import random_table
from dscore_plugin.datasets.image_set import ImageData, training_and_validation, whole
from dscore_plugin.datasets.packed import IMAGENET_MEAN, IMAGENET_STD
from dscore_plugin.datasets.reading import first_line
from dscore_plugin.errors import DataError

FOLDER_IMAGE_SIZE = 224
_CENTRE_FRACTION = 0.875  # of the resized image, as is customary on ImageNet


class _FolderImages:
    """Image files of any size, read anew each time, with ImageNet's customary transforms.

    Args:
        samples: path and label of each image.
        size: height and width of what comes out.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], size: int) -> None:
        from torchvision.transforms import v2

        self.paths = [path for path, _ in samples]
        self.labels = torch.tensor([label for _, label in samples])
        normalise = [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            v2.ToPureTensor(),
        ]
        self._plain = v2.Compose([v2.Resize(round(size / _CENTRE_FRACTION)), v2.CenterCrop(size), *normalise])
        self._augmented = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *normalise])

    def plain(self, indices: Tensor) -> Tensor:
        return torch.stack([self._plain(self._open(index)) for index in indices.tolist()])

    def augmented(self, indices: Tensor, seed: int, epoch: int) -> Tensor:
        seeds = random_table(seed, epoch, len(self.labels), (2**63 - 1,))
        images = []
        with _own_random_numbers() as reseed:
            for index in indices.tolist():
                reseed(int(seeds[index, 0]))
                images.append(self._augmented(self._open(index)))
        return torch.stack(images)

    def _open(self, index: int) -> Any:
        from PIL import Image

        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"image {path} cannot be read ({first_line(error)}); replace it or take it away"
            ) from error


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[Callable[[int], Any]]:
    """Lend out torch's random numbers on the processor, which transforms draw from, and restore them."""
    state = torch.default_generator.get_state()
    try:
        yield torch.default_generator.manual_seed  # torch.manual_seed would touch the accelerator's too
    finally:
        torch.default_generator.set_state(state)


def load_folder(path: Path, validation_fraction: float, seed: int, size: int) -> ImageData:
    """Load ``train``, ``val`` (or ``validation``) and ``test`` of a folder; one of the last two may be missing."""
    validation_folders = [path / part for part in ("val", "validation") if (path / part).is_dir()][:1]
    test_folders = [path / "test"] if (path / "test").is_dir() else []
    if not (path / "train").is_dir() or not validation_folders + test_folders:
        raise DataError(
            f"data folder {path} is in no known layout for 'imagefolder'; looked for train, and for val, "
            "validation or test beside it, each with one folder per class"
        )
    classes, source = _list_images(path / "train", size)
    others = [_list_same_classes(folder, size, classes) for folder in validation_folders + test_folders]
    if len(others) == 2:
        train, validation = whole(source, seed, augmented=True), whole(others[0], seed)
    else:
        train, validation = training_and_validation(source, validation_fraction, seed)
    return ImageData(
        name="imagefolder",
        train=train,
        validation=validation,
        test=whole(others[-1], seed),
        num_classes=len(classes),
        input_shape=(3, size, size),
        class_names=classes,
    )


def _list_images(folder: Path, size: int) -> tuple[tuple[str, ...], _FolderImages]:
    """Find the classes and the images of a folder with one folder per class."""
    from torchvision.datasets import ImageFolder

    try:
        listed = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise DataError(
            f"data folder {folder} lacks images ({first_line(error)}); expected one folder of them per class"
        ) from error
    return tuple(listed.classes), _FolderImages(listed.samples, size)


def _list_same_classes(folder: Path, size: int, classes: tuple[str, ...]) -> _FolderImages:
    found, images = _list_images(folder, size)
    if found != classes:
        odd = sorted(set(found) ^ set(classes))
        raise DataError(
            f"data folder {folder} has other classes than train (only one of them has {', '.join(odd[:3])}); "
            f"expected the same {len(classes)} folders in both"
        )
    return images
