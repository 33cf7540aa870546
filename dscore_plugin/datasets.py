"""Data sets by name: digits, CIFAR, SVHN and folders of images, split into training, validation and test.

Small images are decoded once and kept as bytes; a batch is cut, flipped and normalised in one go.
Augmentation is a pure function of seed, epoch and image, so that neither the batch size nor the number of
processes changes what a network is shown.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler

from dscore_plugin.errors import DataError, did_you_mean

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIGITS_MEAN, DIGITS_STD = (0.3053,), (0.3760,)

_AUGMENTATION, _ORDER, _SUBSET, _SPLIT = range(4)  # streams of random numbers, each independent of the others
_DIGITS_TEST_FRACTION = 0.2
_FOLDER_IMAGE_SIZE = 224
_CENTRE_FRACTION = 0.875  # of the resized image, as is customary on ImageNet


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
        rng = np.random.default_rng([seed, _SUBSET])
        ranks = _ranks_within_class(self.labels.numpy(), rng)
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


def load_data(
    spec: str, *, validation_fraction: float = 0.1, seed: int = 0, image_size: int | None = None
) -> ImageData:
    """Load a data set by name.

    Args:
        spec: ``"digits"`` (scikit-learn's, 8x8); ``"cifar10"``, ``"cifar100"`` or ``"svhn"``, which
            torchvision downloads to ``$DSCORE_DATA`` or ``~/.cache/dscore-plugin/data``; one of these three
            with a folder, ``"cifar10:PATH"``, in torchvision's or the Hub's parquet layout, at PATH or just
            below; or ``"imagefolder:PATH"``, with ``PATH/train/CLASS/*`` and the like in ``PATH/val`` (or
            ``PATH/validation``) or ``PATH/test``.
            torchvision's files hold pickles; it opens them only where their checksums are those it knows.
        validation_fraction: how much of each training class is held out for validation, in (0, 1). Not used
            where a folder of images brings both ``val`` and ``test``; if it brings one, that is the test set.
        seed: of the held-out split and of the augmentation, 0 or more.
        image_size: height and width to resize to; by default the images' own, for folders 224.

    Returns:
        The data set. Small images are decoded at the first use of their split.

    Raises:
        DataError: if the name is unknown, the folder is missing or in no known layout, the data is damaged or
            empty, cannot be downloaded, or an argument is out of range.
    """
    name, path = _parse(spec)
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction is {validation_fraction}; expected a number between 0 and 1")
    if seed < 0:
        raise DataError(f"data seed is {seed}; expected 0 or more")
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size is {image_size}; expected a number of pixels, 1 or more")
    if name == "imagefolder":
        assert path is not None
        return _load_folder(path, validation_fraction, seed, image_size or _FOLDER_IMAGE_SIZE)
    if name == "digits":
        return _load_digits(validation_fraction, seed, image_size)
    return _load_packed(name, path, validation_fraction, seed, image_size)


def _parse(spec: str) -> tuple[str, Path | None]:
    """Take ``"name"`` or ``"name:PATH"`` apart; the folder exists, and is there where one is needed."""
    name, colon, folder = spec.partition(":")
    known = ("digits", *_PACKED, "imagefolder")
    if name not in known:
        hint = did_you_mean(name, known) or ";"
        raise DataError(f"data set {name!r} is unknown{hint} expected one of {', '.join(known)}")
    if name == "digits" and colon:
        raise DataError("data set 'digits' takes no folder; it comes with scikit-learn: write 'digits'")
    if (colon or name == "imagefolder") and not folder:
        raise DataError(f"data set {spec!r} names no folder; write '{name}:PATH'")
    if not colon:
        return name, None
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise DataError(f"data folder {path} is missing; expected the images of {name!r} there")
    return name, path


# Splits -----------------------------------------------------------------------------------------------------


def _ranks_within_class(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Number the images of each class 0, 1, 2, ... in random order."""
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks


def _hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split images class by class.

    Args:
        labels: class of every image, ``(n,)``.
        fraction: how much of each class is held out; at least one image, and at most all but one.
        seed: of the choice.

    Returns:
        Indices that stay and indices held out, both ascending.

    Raises:
        DataError: if nothing could be held out, as every class has one image only.
    """
    counts = np.bincount(labels.numpy())
    quota = np.minimum(np.maximum(np.floor(fraction * counts + 0.5), 1), counts - 1)
    ranks = _ranks_within_class(labels.numpy(), np.random.default_rng([seed, _SPLIT]))
    held_out = torch.from_numpy(ranks < quota[labels.numpy()])
    if not held_out.any():
        raise DataError(
            f"no validation images can be held out of {len(labels)} training images; "
            "expected a class with two images or more"
        )
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def _training_and_validation(source: ImageSource, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Hold a validation set out of training images; only what stays is augmented."""
    kept, held_out = _hold_out(source.labels, fraction, seed)
    return ImageSet(source, kept, augmented=True, seed=seed), ImageSet(source, held_out, seed=seed)


def _whole(source: ImageSource, seed: int, *, augmented: bool = False) -> ImageSet:
    return ImageSet(source, torch.arange(len(source.labels)), augmented=augmented, seed=seed)


# Images in memory -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _random_table(seed: int, epoch: int, rows: int, highs: tuple[int, ...]) -> np.ndarray:
    """Draw the numbers that augment each image of a source: ``(rows, len(highs))``, below ``highs``."""
    return np.random.default_rng([seed, epoch, _AUGMENTATION]).integers(highs, size=(rows, len(highs)))


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
        draws = torch.from_numpy(_random_table(seed, epoch, len(self.labels), highs)[indices.numpy()])
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


class _ShuffledOrder(Sampler[int]):
    """The order of an epoch, as a pure function of the seed and of the set's epoch."""

    def __init__(self, images: ImageSet, seed: int) -> None:
        self.images = images
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.images.epoch, _ORDER])
        return iter(rng.permutation(len(self.images)).tolist())


def _as_they_are(batch: Any) -> Any:
    return batch


def _same(pixels: Tensor) -> Tensor:
    return pixels


# Digits, CIFAR, SVHN ----------------------------------------------------------------------------------------


class _Packed(NamedTuple):
    """What is known of a data set of small colour images, 32x32."""

    torchvision_class: str
    torchvision_file: str  # what torchvision puts into its folder
    num_classes: int
    label_columns: tuple[str, ...]  # in the Hub's parquet files
    flip: bool


_PACKED: Mapping[str, _Packed] = {
    "cifar10": _Packed("CIFAR10", "cifar-10-batches-py", 10, ("label",), flip=True),
    "cifar100": _Packed("CIFAR100", "cifar-100-python", 100, ("fine_label", "label"), flip=True),
    "svhn": _Packed("SVHN", "train_32x32.mat", 10, ("label",), flip=False),
}
_IMAGE_COLUMNS = ("img", "image")
_PACKED_SHAPE = (3, 32, 32)
_PACKED_SHIFT = 4


class _Split(NamedTuple):
    """One split as read: how to get the pixels, uint8 ``(N, C, H, W)``; the labels; the classes' names."""

    decode: Callable[[], Tensor]
    labels: Tensor
    class_names: tuple[str, ...]


def _load_digits(validation_fraction: float, seed: int, image_size: int | None) -> ImageData:
    """Split scikit-learn's 1,797 digits: a fifth is the test set, the same for every seed."""
    digits = _optional("sklearn.datasets").load_digits()
    labels = torch.from_numpy(digits.target).long()
    pixels = torch.from_numpy(digits.images).to(torch.uint8)[:, None]
    names = tuple(str(name) for name in digits.target_names)
    form = _Form(16.0, DIGITS_MEAN, DIGITS_STD, shift=1, flip=False, image_size=image_size)
    rest, test = (
        _PackedImages(functools.partial(_same, pixels[part]), labels[part], form)
        for part in _hold_out(labels, _DIGITS_TEST_FRACTION, seed=0)
    )
    train, validation = _training_and_validation(rest, validation_fraction, seed)
    side = image_size or pixels.shape[-1]
    return ImageData("digits", train, validation, _whole(test, seed), len(names), (1, side, side), names)


def _load_packed(
    name: str, path: Path | None, validation_fraction: float, seed: int, image_size: int | None
) -> ImageData:
    known = _PACKED[name]
    splits = _download(name, known) if path is None else _read(name, known, path)
    for part, split in zip(("training", "test"), splits, strict=True):
        _check_labels(split.labels, known.num_classes, f"the {part} images of {name!r}")
    form = _Form(255.0, IMAGENET_MEAN, IMAGENET_STD, _PACKED_SHIFT, known.flip, image_size)
    rest, test = (_PackedImages(split.decode, split.labels, form) for split in splits)
    train, validation = _training_and_validation(rest, validation_fraction, seed)
    side = image_size or _PACKED_SHAPE[-1]
    return ImageData(
        name, train, validation, _whole(test, seed), known.num_classes, (3, side, side), splits[0].class_names
    )


def _check_labels(labels: Tensor, num_classes: int, what: str) -> None:
    if not len(labels):
        raise DataError(f"{what} are none; expected at least one: look whether the files are complete")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise DataError(
            f"{what} have labels {lowest} to {highest}; expected 0 to {num_classes - 1}: another data set?"
        )


def _download(name: str, known: _Packed) -> tuple[_Split, _Split]:
    root = Path(os.environ.get("DSCORE_DATA") or Path.home() / ".cache" / "dscore-plugin" / "data")
    try:
        root.mkdir(parents=True, exist_ok=True)
        return _through_torchvision(known, root, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"data set {name!r} cannot be downloaded to {root} ({_first_line(error)}); "
            f"give a folder that has it: '{name}:PATH', or set DSCORE_DATA"
        ) from error


def _read(name: str, known: _Packed, path: Path) -> tuple[_Split, _Split]:
    """Read a data set from a folder in one of the two known layouts, at ``path`` or just below."""
    folders = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
    if path.absolute().name == known.torchvision_file:
        folders.insert(0, path.absolute().parent)
    for folder in folders:
        if (folder / known.torchvision_file).exists():
            return _read_torchvision(known, folder)
        train, test = (sorted(folder.glob(f"{part}*.parquet")) for part in ("train", "test"))
        columns = _find_columns(known, train[0]) if train and test else None
        if columns:
            return _read_parquet(known, train, *columns), _read_parquet(known, test, *columns)
    raise DataError(
        f"data folder {path} is in no known layout for {name!r}; looked there and just below for "
        f"{known.torchvision_file} (torchvision's) and for train*.parquet beside test*.parquet with a column "
        f"{' or '.join(_IMAGE_COLUMNS)} and a column {' or '.join(known.label_columns)} (the Hub's)"
    )


def _read_torchvision(known: _Packed, root: Path) -> tuple[_Split, _Split]:
    try:
        return _through_torchvision(known, root, download=False)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"data folder {root} has a {known.torchvision_file} that cannot be used ({_first_line(error)}); "
            "expected the files of the original archive, by their checksums: unpack it again"
        ) from error


def _through_torchvision(known: _Packed, root: Path, download: bool) -> tuple[_Split, _Split]:
    """Read both splits by torchvision's own class, which compares checksums before it opens a pickle."""
    dataset_class = getattr(_optional("torchvision.datasets"), known.torchvision_class)
    if known.torchvision_class == "SVHN":
        _optional("scipy.io")
        which: Sequence[dict[str, Any]] = ({"split": "train"}, {"split": "test"})
    else:
        which = ({"train": True}, {"train": False})
    with contextlib.redirect_stdout(sys.stderr):  # torchvision reports there, where results belong
        train, test = (_from_torchvision(dataset_class(root, download=download, **part)) for part in which)
    return train, test


def _from_torchvision(data: Any) -> _Split:
    if hasattr(data, "targets"):  # CIFAR: height, width, channels
        pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        labels, names = torch.tensor(data.targets, dtype=torch.int64), tuple(data.classes)
    else:  # SVHN: channels, height, width
        pixels = torch.from_numpy(np.ascontiguousarray(data.data))
        labels, names = torch.from_numpy(data.labels).long(), tuple(str(digit) for digit in range(10))
    return _Split(functools.partial(_same, pixels), labels, names)


def _find_columns(known: _Packed, file: Path) -> tuple[str, str] | None:
    """Name the column of encoded images and the column of labels, or None where the file lacks one."""
    types = _optional("pyarrow.types")
    with _readable(file):
        schema = _optional("pyarrow.parquet").read_schema(file)
    present = dict(zip(schema.names, schema.types, strict=True))
    encoded = {
        name for name, kind in present.items() if types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    }
    image = next((name for name in _IMAGE_COLUMNS if name in encoded), None)
    integers = {name for name, kind in present.items() if types.is_integer(kind)}
    label = next((name for name in known.label_columns if name in integers), None)
    return (image, label) if image and label else None


def _read_parquet(known: _Packed, files: Sequence[Path], image_column: str, label_column: str) -> _Split:
    """Read the labels of a split; the images wait until they are needed."""
    parquet = _optional("pyarrow.parquet")
    labels = []
    for file in files:
        with _readable(file):
            column = parquet.read_table(file, columns=[label_column])[label_column]
        if column.null_count:
            lacking = f"{column.null_count} of {len(column)} images"
            raise DataError(f"data file {file} lacks the label of {lacking}; expected all: fetch it again")
        labels.append(column.to_numpy())
    names = _class_names(parquet.read_schema(files[0]).metadata, label_column)
    decode = functools.partial(_decode_parquet, files, image_column, sum(map(len, labels)))
    fallback = tuple(str(label) for label in range(known.num_classes))
    return _Split(
        decode,
        torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        names if len(names) == known.num_classes else fallback,
    )


def _class_names(metadata: Mapping[bytes, bytes] | None, label_column: str) -> tuple[str, ...]:
    """Look the names of the classes up in what the Hub writes into the schema; empty where it did not."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label_column]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _decode_parquet(files: Sequence[Path], column: str, count: int) -> Tensor:
    """Decode the images of parquet files, in order: uint8, ``(count, 3, 32, 32)``."""
    parquet = _optional("pyarrow.parquet")
    pixels = np.empty((count, *_PACKED_SHAPE), dtype=np.uint8)
    row = 0
    for file in files:
        with _readable(file):
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024, columns=[column]):
                for encoded in batch.column(0).field("bytes"):
                    pixels[row] = _decode(encoded.as_py(), f"image {row} of {file.parent} ({file.name})")
                    row += 1
    return torch.from_numpy(pixels)


def _decode(encoded: bytes | None, what: str) -> np.ndarray:
    """Decode one PNG or JPEG to uint8, ``(3, 32, 32)``."""
    from PIL import Image

    try:
        pixels = np.asarray(Image.open(io.BytesIO(encoded or b"")).convert("RGB")).transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{what} cannot be decoded ({_first_line(error)}); expected a PNG or JPEG") from error
    if pixels.shape != _PACKED_SHAPE:
        raise DataError(f"{what} has shape {pixels.shape}; expected {_PACKED_SHAPE}")
    return pixels


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn what pyarrow raises on a file that is no parquet, or a damaged one, into a DataError."""
    arrow_error = _optional("pyarrow").ArrowException
    try:
        yield
    except (OSError, KeyError, arrow_error) as error:
        raise DataError(
            f"data file {file} cannot be read ({_first_line(error)}); "
            "expected parquet as on the Hub: fetch it again"
        ) from error


def _optional(module: str) -> ModuleType:
    """Import what only some data sets need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(
            f"{package} is not installed, which this data set needs; pip install 'dscore-plugin[data]'"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# Folders of images ------------------------------------------------------------------------------------------


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
        seeds = _random_table(seed, epoch, len(self.labels), (2**63 - 1,))
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
                f"image {path} cannot be read ({_first_line(error)}); replace it or take it away"
            ) from error


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[Callable[[int], Any]]:
    """Lend out torch's random numbers on the processor, which transforms draw from, and restore them."""
    state = torch.default_generator.get_state()
    try:
        yield torch.default_generator.manual_seed  # torch.manual_seed would touch the accelerator's too
    finally:
        torch.default_generator.set_state(state)


def _load_folder(path: Path, validation_fraction: float, seed: int, size: int) -> ImageData:
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
        train, validation = _whole(source, seed, augmented=True), _whole(others[0], seed)
    else:
        train, validation = _training_and_validation(source, validation_fraction, seed)
    return ImageData(
        name="imagefolder",
        train=train,
        validation=validation,
        test=_whole(others[-1], seed),
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
            f"data folder {folder} lacks images ({_first_line(error)}); expected one folder of them per class"
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
