"""Data sets by name."""

from __future__ import annotations

from pathlib import Path

from dscore_plugin.datasets.folder import FOLDER_IMAGE_SIZE, load_folder
from dscore_plugin.datasets.image_set import ImageData
from dscore_plugin.datasets.packed import load_digits, load_packed
from dscore_plugin.datasets.reading import PACKED
from dscore_plugin.errors import DataError, did_you_mean


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
        return load_folder(path, validation_fraction, seed, image_size or FOLDER_IMAGE_SIZE)
    if name == "digits":
        return load_digits(validation_fraction, seed, image_size)
    return load_packed(name, path, validation_fraction, seed, image_size)


def _parse(spec: str) -> tuple[str, Path | None]:
    """Take ``"name"`` or ``"name:PATH"`` apart; the folder exists, and is there where one is needed."""
    name, colon, folder = spec.partition(":")
    known = ("digits", *PACKED, "imagefolder")
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
