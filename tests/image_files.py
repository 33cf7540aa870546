"""Small images on a disk, in the layouts that timm's readers know; class ``i`` is the colour channel that is bright."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = 3


def picture(number: int) -> bytes:
    """Draw the image of this number, of class ``number % 3``, as PNG; its mean tells the number."""
    pixels = np.random.default_rng(number).integers(0, 90, (36, 40, 3))
    pixels[:, :, number % CLASSES] += 120
    pixels[0, 0, :] = number
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def make_folder(root: Path, train: int = 24, val: int = 12) -> Path:
    """Write ``train/CLASS/*.png`` and ``val/CLASS/*.png``."""
    for split, first, count in (("train", 0, train), ("val", train, val)):
        for number in range(first, first + count):
            file = root / split / f"class{number % CLASSES}" / f"{number:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(number))
    return root


def make_shards(root: Path, shards: int = 4, each: int = 6) -> Path:
    """Write ``train-0.tar`` and so on for WebDataset, and ``val-0.tar`` and so on with as many."""
    pytest.importorskip("webdataset", reason="shards need the package webdataset (dscore-plugin[streams])")
    root.mkdir(parents=True)
    for split in ("train", "val"):
        for shard in range(shards):
            with tarfile.open(root / f"{split}-{shard}.tar", "w") as tar:
                for number in range(shard * each, (shard + 1) * each):
                    parts = {"png": picture(number), "cls": str(number % CLASSES).encode()}
                    for ending, content in parts.items():
                        member = tarfile.TarInfo(f"{number:03}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    return root


def make_hub_folder(root: Path, files: int = 2, count: int = 24) -> Path:
    """Write parquet files as on the Hub: splits ``train`` and ``validation`` with the same images."""
    reason = "the Hub's layout needs the package datasets (dscore-plugin[streams])"
    datasets = pytest.importorskip("datasets", reason=reason)
    names = datasets.ClassLabel(names=[f"class{i}" for i in range(CLASSES)])
    rows = {
        "image": [{"bytes": picture(number), "path": None} for number in range(count)],
        "label": [number % CLASSES for number in range(count)],
    }
    whole = datasets.Dataset.from_dict(
        rows, features=datasets.Features({"image": datasets.Image(), "label": names})
    )
    (root / "data").mkdir(parents=True)
    datasets.disable_progress_bars()
    for split in ("train", "validation"):
        for file in range(files):
            name = f"{split}-{file:05}-of-{files:05}.parquet"
            whole.shard(files, file).to_parquet(str(root / "data" / name))
    return root
