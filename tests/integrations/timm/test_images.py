from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from dscore_plugin.datasets import ImageSet
from dscore_plugin.errors import DataError, ModelError
from dscore_plugin.integrations.timm.images import ReaderStream, check_same_classes, data_form, load_images
from dscore_plugin.training.batches import load_batches
from dscore_plugin.training.feed import ImageStream
from tests.image_files import make_folder, make_hub_folder, make_shards

FORM = {
    "input_size": (3, 32, 32), "interpolation": "bilinear", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4),
    "crop_pct": 0.9, "crop_mode": "center",
}  # fmt: skip


def open_folder(tmp_path: Path, split: str, **options: Any) -> ImageSet | ReaderStream:
    return load_images("", str(make_folder(tmp_path / "folder")), split, FORM, **options)


def open_hub(tmp_path: Path, split: str, **options: Any) -> ImageSet | ReaderStream:
    name = f"hfds/{make_hub_folder(tmp_path / 'hub')}"
    return load_images(name, str(tmp_path / "cache"), split, FORM, **options)


def open_shards(tmp_path: Path, split: str, **options: Any) -> ImageSet | ReaderStream:
    root = str(make_shards(tmp_path / "shards"))
    return load_images("wds/tiny", root, f"{split}-{{0..3}}.tar|24", FORM, **options)


def open_streamed_hub(tmp_path: Path, split: str, **options: Any) -> ImageSet | ReaderStream:
    name = f"hfids/{make_hub_folder(tmp_path / 'hub')}"
    split = {"val": "validation"}.get(split, split)
    return load_images(name, str(tmp_path / "cache"), split, FORM, num_samples=24, **options)


Open = Callable[..., Any]


# --- sets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("open_set", [open_folder, open_hub])
def test_a_set_gives_images_and_labels_in_the_models_form(tmp_path: Path, open_set: Open) -> None:
    images = open_set(tmp_path, "train")
    assert isinstance(images, ImageSet)
    assert len(images) == 24
    pixels, labels = images.__getitems__(list(range(24)))
    assert pixels.shape == (24, 3, 32, 32)
    assert pixels.dtype == torch.float32
    mean, std = (torch.tensor(FORM[name]).view(3, 1, 1) for name in ("mean", "std"))
    brightness = (pixels * std + mean).mean(dim=(2, 3))
    assert brightness.argmax(dim=1).equal(labels)
    assert labels.equal(images.labels)
    assert brightness.max() == pytest.approx((120 + 44.5) / 255, abs=0.02)


@pytest.mark.parametrize("open_set", [open_folder, open_hub])
def test_augmentation_is_a_function_of_seed_epoch_and_image(tmp_path: Path, open_set: Open) -> None:
    images = open_set(
        tmp_path, "train", training=True, seed=3, augmentation={"auto_augment": "rand-m7-mstd0.5"}
    )
    images.set_epoch(2)
    whole, _ = images.__getitems__([4, 9, 1])
    random.random(), np.random.rand(), torch.rand(1)
    assert images.__getitems__([9])[0][0].equal(whole[1])
    batches = list(load_batches(images, [[1, 9], [4]], workers=1))  # read in another process
    assert torch.cat([pixels for pixels, _ in batches]).equal(whole[[2, 1, 0]])
    images.set_epoch(3)
    assert not images.__getitems__([9])[0][0].equal(whole[1])
    assert not images.plain().__getitems__([9])[0][0].equal(whole[1])


def test_augmentation_leaves_random_numbers_alone(tmp_path: Path) -> None:
    images = open_folder(tmp_path, "train", training=True)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    images.__getitems__([0, 1])
    drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert drawn == (random.random(), float(np.random.rand()), float(torch.rand(())))


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    images = open_folder(tmp_path, "train")
    file = tmp_path / "folder" / "train" / "class0" / "000.png"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"image 0 \(.*000.png\) cannot be read"):
        images.__getitems__([0])


def test_folders_with_other_classes_are_refused(tmp_path: Path) -> None:
    train, validation = open_folder(tmp_path, "train"), open_folder(tmp_path, "val")
    check_same_classes(train, validation)
    (tmp_path / "folder" / "val" / "class2").rename(tmp_path / "folder" / "val" / "other")
    with pytest.raises(DataError, match="other classes .see class2, other"):
        check_same_classes(train, load_images("", str(tmp_path / "folder"), "val", FORM))


# --- streams ---------------------------------------------------------------------------------------------


def same(first: Iterable[tuple[Tensor, Tensor]], second: Iterable[tuple[Tensor, Tensor]]) -> bool:
    return all(a.equal(b) and c.equal(d) for (a, c), (b, d) in zip(first, second, strict=True))


@pytest.mark.parametrize("open_stream", [open_shards, open_streamed_hub])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_of_a_stream_is_a_function_of_its_arguments(
    tmp_path: Path, open_stream: Open, workers: int
) -> None:
    stream = open_stream(tmp_path, "train", training=True)
    assert isinstance(stream, ImageStream)
    assert len(stream) == 24

    def epoch(number: int, seed: int = 0, process: int = 0) -> list[tuple[Tensor, Tensor]]:
        torch.rand(1), random.random(), np.random.rand()
        read = stream.training_batches(number, 4, seed=seed, process=process, processes=2, workers=workers)
        return list(read)

    first = epoch(1)
    assert len(first) >= 24 // (2 * 4)
    assert all(len(labels) == 4 and pixels.shape == (4, 3, 32, 32) for pixels, labels in first)
    assert same(epoch(1), first)  # also of a stream that was not read from its first epoch on
    for other in (epoch(2), epoch(1, seed=1), epoch(1, process=1)):
        assert not same(first[:1], other[:1])


@pytest.mark.parametrize("open_stream", [open_shards, open_streamed_hub])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_an_evaluation_sees_every_image_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_stream: Open, processes: int
) -> None:
    stream = open_stream(tmp_path, "val")
    seen = []
    for process in range(processes):
        group = {"is_initialized": True, "get_world_size": processes, "get_rank": process}
        for name, answer in group.items():  # what timm's readers ask, to divide the images in their own way
            monkeypatch.setattr(torch.distributed, name, lambda answer=answer: answer)
        for pixels, _ in stream.evaluation_batches(5, process=process, processes=processes, workers=0):
            seen += pixels.mean(dim=(1, 2, 3)).tolist()
    expected = load_images("", str(make_folder(tmp_path / "folder", 24, 0)), "train", FORM).__getitems__(
        range(24)
    )
    assert sorted(seen) == pytest.approx(sorted(expected[0].mean(dim=(1, 2, 3)).tolist()))


def test_too_few_shards_are_named(tmp_path: Path) -> None:
    stream = open_shards(tmp_path, "train", training=True)
    with pytest.raises(DataError, match="4 shards cannot feed 2 processes x 3 workers"):
        stream.training_batches(0, 2, seed=0, process=0, processes=2, workers=3)  # type: ignore[union-attr]


# --- bad input, and the form -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["imagenet", "tfds/imagenet2012", "torch/cifar10"])
def test_an_unknown_reader_is_named(name: str) -> None:
    with pytest.raises(DataError, match=f"data set '{name}' is unknown"):
        load_images(name, None, "train", FORM)


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened .*check its name, root and split"):
        load_images("", str(tmp_path / "nothing"), "train", FORM)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="Found 0 images"):
        load_images("", str(tmp_path / "empty"), "train", FORM)


def test_a_folder_without_the_split_is_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "folder")
    with pytest.raises(DataError, match="has no folder 'train'"):
        load_images("", str(root / "train"), "train", FORM)
    assert len(load_images("", str(root), "validation", FORM)) == 12  # a folder "val" will do


def test_shards_of_unknown_length_are_named(tmp_path: Path) -> None:
    root = str(make_shards(tmp_path / "shards"))
    with pytest.raises(DataError, match="give num_samples"):
        load_images("wds/tiny", root, "val-{0..3}.tar", FORM)


def test_the_form_is_the_models_own() -> None:
    model = timm.create_model("test_resnet")
    config = timm.get_pretrained_cfg("test_resnet")
    form = data_form(model)
    assert (form["input_size"], form["mean"], form["crop_pct"]) == (
        config.input_size,
        config.mean,
        config.crop_pct,
    )
    assert data_form(model, 48)["input_size"] == (3, 48, 48)
    assert data_form("test_resnet") == form


def test_a_tag_tells_the_form_of_its_weights() -> None:
    first, other = data_form("resnet50.tv_in1k"), data_form("resnet50.a1_in1k")
    assert (first["interpolation"], first["crop_pct"]) == ("bilinear", 0.875)
    assert (other["interpolation"], other["crop_pct"]) == ("bicubic", 0.95)
    assert data_form("a_network_without_weights")["input_size"] == (3, 224, 224)
    with pytest.raises(ModelError, match="Invalid pretrained tag"):
        data_form("resnet50.nobody")


def test_plain_images_are_what_timm_makes_of_them(tmp_path: Path) -> None:
    images = open_folder(tmp_path, "val")
    with Image.open(tmp_path / "folder" / "val" / "class0" / "024.png") as file:
        expected = timm.data.create_transform(**FORM)(file.convert("RGB"))
    assert images.__getitems__([0])[0][0].equal(expected)
