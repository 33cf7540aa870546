"""CIFAR and SVHN as their bytes lie on a disk: downloaded, in torchvision's layout or in the Hub's."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dscore_plugin.errors import DataError


class Packed(NamedTuple):
    """What is known of a data set of small colour images, 32x32."""

    torchvision_class: str
    torchvision_file: str  # what torchvision puts into its folder
    num_classes: int
    label_columns: tuple[str, ...]  # in the Hub's parquet files
    flip: bool


PACKED: Mapping[str, Packed] = {
    "cifar10": Packed("CIFAR10", "cifar-10-batches-py", 10, ("label",), flip=True),
    "cifar100": Packed("CIFAR100", "cifar-100-python", 100, ("fine_label", "label"), flip=True),
    "svhn": Packed("SVHN", "train_32x32.mat", 10, ("label",), flip=False),
}
_IMAGE_COLUMNS = ("img", "image")
PACKED_SHAPE = (3, 32, 32)


class Split(NamedTuple):
    """One split as read: how to get the pixels, uint8 ``(N, C, H, W)``; the labels; the classes' names."""

    decode: Callable[[], Tensor]
    labels: Tensor
    class_names: tuple[str, ...]


def download(name: str, known: Packed) -> tuple[Split, Split]:
    """Download a data set through torchvision, into its cache; training and test images."""
    root = Path(os.environ.get("DSCORE_DATA") or Path.home() / ".cache" / "dscore-plugin" / "data")
    try:
        root.mkdir(parents=True, exist_ok=True)
        return _through_torchvision(known, root, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"data set {name!r} cannot be downloaded to {root} ({first_line(error)}); "
            f"give a folder that has it: '{name}:PATH', or set DSCORE_DATA"
        ) from error


def read(name: str, known: Packed, path: Path) -> tuple[Split, Split]:
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


def _read_torchvision(known: Packed, root: Path) -> tuple[Split, Split]:
    try:
        return _through_torchvision(known, root, download=False)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"data folder {root} has a {known.torchvision_file} that cannot be used ({first_line(error)}); "
            "expected the files of the original archive, by their checksums: unpack it again"
        ) from error


def _through_torchvision(known: Packed, root: Path, download: bool) -> tuple[Split, Split]:
    """Read both splits by torchvision's own class, which compares checksums before it opens a pickle."""
    dataset_class = getattr(optional("torchvision.datasets"), known.torchvision_class)
    if known.torchvision_class == "SVHN":
        optional("scipy.io")
        which: Sequence[dict[str, Any]] = ({"split": "train"}, {"split": "test"})
    else:
        which = ({"train": True}, {"train": False})
    with contextlib.redirect_stdout(sys.stderr):  # torchvision reports there, where results belong
        train, test = (_from_torchvision(dataset_class(root, download=download, **part)) for part in which)
    return train, test


def _from_torchvision(data: Any) -> Split:
    if hasattr(data, "targets"):  # CIFAR: height, width, channels
        pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        labels, names = torch.tensor(data.targets, dtype=torch.int64), tuple(data.classes)
    else:  # SVHN: channels, height, width
        pixels = torch.from_numpy(np.ascontiguousarray(data.data))
        labels, names = torch.from_numpy(data.labels).long(), tuple(str(digit) for digit in range(10))
    return Split(functools.partial(as_given, pixels), labels, names)


def _find_columns(known: Packed, file: Path) -> tuple[str, str] | None:
    """Name the column of encoded images and the column of labels, or None where the file lacks one."""
    types = optional("pyarrow.types")
    with _readable(file):
        schema = optional("pyarrow.parquet").read_schema(file)
    present = dict(zip(schema.names, schema.types, strict=True))
    encoded = {
        name for name, kind in present.items() if types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    }
    image = next((name for name in _IMAGE_COLUMNS if name in encoded), None)
    integers = {name for name, kind in present.items() if types.is_integer(kind)}
    label = next((name for name in known.label_columns if name in integers), None)
    return (image, label) if image and label else None


def _read_parquet(known: Packed, files: Sequence[Path], image_column: str, label_column: str) -> Split:
    """Read the labels of a split; the images wait until they are needed."""
    parquet = optional("pyarrow.parquet")
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
    return Split(
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
    parquet = optional("pyarrow.parquet")
    pixels = np.empty((count, *PACKED_SHAPE), dtype=np.uint8)
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
        raise DataError(f"{what} cannot be decoded ({first_line(error)}); expected a PNG or JPEG") from error
    if pixels.shape != PACKED_SHAPE:
        raise DataError(f"{what} has shape {pixels.shape}; expected {PACKED_SHAPE}")
    return pixels


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn what pyarrow raises on a file that is no parquet, or a damaged one, into a DataError."""
    arrow_error = optional("pyarrow").ArrowException
    try:
        yield
    except (OSError, KeyError, arrow_error) as error:
        raise DataError(
            f"data file {file} cannot be read ({first_line(error)}); "
            "expected parquet as on the Hub: fetch it again"
        ) from error


def as_given(pixels: Tensor) -> Tensor:
    """Return pixels that are decoded already."""
    return pixels


def optional(module: str) -> ModuleType:
    """Import what only some data sets need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(
            f"{package} is not installed, which this data set needs; pip install 'dscore-plugin[data]'"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class."""
    return (str(error).splitlines() or [type(error).__name__])[0]
