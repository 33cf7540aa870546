"""Data sets: what is read, how it is split, how it is augmented, and what is refused in which words."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as reference

from dscore_plugin.datasets import ImageData, ImageSet, draws, load_data, packed, reading
from dscore_plugin.errors import DataError
from dscore_plugin.models import create_model, load_weights

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels.float() / 255 - MEAN) / STD


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def random_pixels(count: int, seed: int = 0) -> np.ndarray:
    """Give ``count`` images as height, width, channels."""
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


# Tiny data sets in every known layout -----------------------------------------------------------------------


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(
    file: Path,
    encoded: list[bytes | None],
    labels: list[Any],
    *,
    image_column: str = "img",
    label_column: str = "label",
    class_names: list[str] | None = None,
) -> None:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array([{"bytes": data, "path": None} for data in encoded], kind)
    table = pa.table({image_column: images, label_column: pa.array(labels)})
    if class_names:
        features = {label_column: {"names": class_names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def write_hub(folder: Path, *, classes: int = 10, train: int = 40, test: int = 20, **columns: Any) -> Path:
    """Write a data set as on the Hub: two training shards, one test shard; images by seed 0 and 1."""
    encoded = [png(pixels) for pixels in random_pixels(train)]
    labels = [i % classes for i in range(train)]
    half = train // 2
    write_parquet(folder / "train-00000-of-00002.parquet", encoded[:half], labels[:half], **columns)
    write_parquet(folder / "train-00001-of-00002.parquet", encoded[half:], labels[half:], **columns)
    write_parquet(
        folder / "test-00000-of-00001.parquet",
        [png(pixels) for pixels in random_pixels(test, seed=1)],
        [i % classes for i in range(test)],
        **columns,
    )
    return folder


def write_torchvision_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, name: str, classes: int) -> Path:
    """Write a tiny CIFAR in torchvision's own format, and let torchvision know its checksums."""
    dataset = getattr(torchvision.datasets, name)
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    label_key = "labels" if name == "CIFAR10" else "fine_labels"

    def write(file: str, content: dict[str, Any]) -> str:
        data = pickle.dumps(content)
        (folder / file).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(count: int, seed: int) -> dict[str, Any]:
        rows = random_pixels(count, seed).transpose(0, 3, 1, 2).reshape(count, -1)
        return {"data": rows, label_key: [i % classes for i in range(count)]}

    names = [f"class{i}" for i in range(classes)]
    key = dataset.meta["key"]
    monkeypatch.setattr(dataset, "train_list", [["train", write("train", batch(3 * classes, 0))]])
    monkeypatch.setattr(dataset, "test_list", [["test", write("test", batch(classes, 1))]])
    meta = {"filename": "meta", "key": key, "md5": write("meta", {key: names})}
    monkeypatch.setattr(dataset, "meta", meta)
    return root


def write_torchvision_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    known = {}
    for part, count, seed in (("train", 30, 0), ("test", 20, 1)):
        file = root / f"{part}_32x32.mat"
        labels = np.array([i % 10 or 10 for i in range(count)])[:, None]  # SVHN writes 10 for the digit 0
        scipy.io.savemat(file, {"X": random_pixels(count, seed).transpose(1, 2, 3, 0), "y": labels})
        known[part] = ["", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", known)
    return root


def write_folder(root: Path, parts: dict[str, int], classes: tuple[str, ...] = ("cat", "dog", "emu")) -> Path:
    """Write images of varying sizes, so many of each class per part."""
    rng = np.random.default_rng(0)
    for part, count in parts.items():
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                shape = (40 + 7 * i, 50 + 3 * i, 3)
                Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(
                    root / part / name / f"{i}.png"
                )
    return root


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hub(tmp_path_factory.mktemp("hub") / "plain_text")


@pytest.fixture(scope="module")
def cifar(hub: Path) -> ImageData:
    return load_data(f"cifar10:{hub}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"), {"train": 6, "val": 2})


def whole(images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    return images.__getitems__(range(len(images)))


# What is read -----------------------------------------------------------------------------------------------


def test_digits_come_whole_and_normalised() -> None:
    data = load_data("digits")
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    assert data.input_shape == (1, 8, 8)
    assert data.num_classes == 10
    assert data.class_names == tuple("0123456789")
    images, _ = whole(data.train.plain())
    assert images.mean().abs() < 0.02
    assert abs(images.std() - 1) < 0.02
    assert images.min() == pytest.approx((0 - 0.3053) / 0.3760)
    assert images.max() == pytest.approx((1 - 0.3053) / 0.3760)


def test_digits_test_set_is_the_same_for_every_seed() -> None:
    first, second = (load_data("digits", seed=seed) for seed in (0, 7))
    assert torch.equal(whole(first.test)[0], whole(second.test)[0])
    assert not torch.equal(first.validation.indices, second.validation.indices)


def test_hub_layout_gives_the_pixels_in_order(cifar: ImageData) -> None:
    images, labels = whole(cifar.test)
    torch.testing.assert_close(images, normalised(as_tensor(random_pixels(20, seed=1))))
    assert labels.tolist() == [i % 10 for i in range(20)]
    training = as_tensor(random_pixels(40))
    for part in (cifar.train.plain(), cifar.validation):
        images, labels = whole(part)
        torch.testing.assert_close(images, normalised(training[part.indices]))
        torch.testing.assert_close(labels, part.indices % 10)
    assert cifar.name == "cifar10"
    assert cifar.input_shape == (3, 32, 32)
    assert cifar.class_names == tuple("0123456789")


def test_hub_layout_is_found_just_below_the_folder(hub: Path, cifar: ImageData) -> None:
    (hub.parent / ".cache").mkdir(exist_ok=True)
    found = load_data(f"cifar10:{hub.parent}")
    assert torch.equal(whole(found.test)[0], whole(cifar.test)[0])


def test_class_names_come_from_the_hubs_metadata(tmp_path: Path) -> None:
    names = [f"fine{i}" for i in range(100)]
    write_hub(
        tmp_path / "cifar100", classes=100, train=200, test=100, label_column="fine_label", class_names=names
    )
    data = load_data(f"cifar100:{tmp_path}")
    assert data.class_names == tuple(names)
    assert data.num_classes == 100
    assert len(data.train) == len(data.validation) == 100


def test_svhn_skips_a_neighbour_without_labels(tmp_path: Path) -> None:
    write_hub(tmp_path / "a_full_numbers", image_column="image", label_column="digits")
    write_hub(tmp_path / "cropped_digits", image_column="image")
    data = load_data(f"svhn:{tmp_path}")
    assert len(data.test) == 20
    assert data.class_names == tuple("0123456789")


def test_images_of_a_hub_folder_are_decoded_once_and_only_when_needed(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    decode = reading._decode
    monkeypatch.setattr(reading, "_decode", lambda data, what: decoded.append(what) or decode(data, what))
    data = load_data(f"cifar10:{hub}")
    assert decoded == []
    for _ in range(2):
        whole(data.test)
    assert len(decoded) == 20
    for part in (data.train, data.train.plain(), data.validation):
        whole(part)
    assert len(decoded) == 60


@pytest.mark.parametrize(
    ("spec", "name", "classes"), [("cifar10", "CIFAR10", 10), ("cifar100", "CIFAR100", 100)]
)
@pytest.mark.parametrize("place", ["", "below", "inside"])
def test_torchvisions_cifar_layout(
    spec: str, name: str, classes: int, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_torchvision_cifar(tmp_path / "below", monkeypatch, name, classes)
    inside = root / getattr(torchvision.datasets, name).base_folder
    data = load_data(f"{spec}:{ {'': root, 'below': tmp_path, 'inside': inside}[place] }")
    images, labels = whole(data.test)
    torch.testing.assert_close(images, normalised(as_tensor(random_pixels(classes, seed=1))))
    assert labels.tolist() == list(range(classes))
    assert data.class_names == tuple(f"class{i}" for i in range(classes))
    assert len(data.train) == 2 * len(data.validation) == 2 * classes


def test_torchvisions_svhn_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_data(f"svhn:{write_torchvision_svhn(tmp_path, monkeypatch)}")
    images, labels = whole(data.test)
    torch.testing.assert_close(images, normalised(as_tensor(random_pixels(20, seed=1))))
    assert labels.tolist() == [i % 10 for i in range(20)]
    assert data.class_names == tuple("0123456789")


def test_without_a_folder_torchvision_downloads_to_the_chosen_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = torchvision.datasets.CIFAR10

    def download(self: Any) -> None:
        print("Downloading")
        if not (Path(self.root) / dataset.base_folder).exists():
            write_torchvision_cifar(Path(self.root), monkeypatch, "CIFAR10", 10)

    monkeypatch.setattr(dataset, "download", download)
    monkeypatch.setenv("DSCORE_DATA", str(tmp_path / "here"))
    data = load_data("cifar10")
    assert len(data.test) == 10
    assert (tmp_path / "here" / dataset.base_folder).is_dir()
    said = capsys.readouterr()
    assert said.out == ""  # results belong there, and nothing else
    assert "Downloading" in said.err


def test_image_size_resizes(hub: Path, cifar: ImageData) -> None:
    data = load_data(f"cifar10:{hub}", image_size=48)
    assert data.input_shape == (3, 48, 48)
    images, _ = data.test.__getitems__([4, 5])
    expected = torch.nn.functional.interpolate(
        cifar.test.__getitems__([4, 5])[0], (48, 48), mode="bilinear", antialias=True
    )
    torch.testing.assert_close(images, expected)
    assert load_data("digits", image_size=32).train[0][0].shape == (1, 32, 32)


# Items, batches, loaders ------------------------------------------------------------------------------------


def test_an_item_is_one_row_of_a_batch(cifar: ImageData) -> None:
    images, labels = cifar.train.__getitems__([3, 0, 3])
    assert images.shape == (3, 3, 32, 32)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    image, label = cifar.train[3]
    assert isinstance(label, int)
    assert torch.equal(images[0], image)
    assert torch.equal(images[2], image)
    assert int(labels[0]) == label
    assert torch.equal(cifar.train[-1][0], cifar.train[len(cifar.train) - 1][0])
    with pytest.raises(IndexError):
        cifar.train[len(cifar.train)]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_ready_batches_in_order(cifar: ImageData, workers: int) -> None:
    batches = list(cifar.test.loader(8, workers=workers))
    assert [len(labels) for _, labels in batches] == [8, 8, 4]
    assert torch.equal(torch.cat([images for images, _ in batches]), whole(cifar.test)[0])
    assert [len(labels) for _, labels in cifar.test.loader(8, drop_last=True)] == [8, 8]


def test_shuffled_order_is_a_function_of_seed_and_epoch(cifar: ImageData) -> None:
    def order(seed: int, epoch: int) -> list[float]:
        images = cifar.train.plain()
        images.set_epoch(epoch)
        return torch.cat([x[:, 0, 0, 0] for x, _ in images.loader(7, shuffle=True, seed=seed)]).tolist()

    first = order(0, 0)
    assert order(0, 0) == first
    assert order(1, 0) != first
    assert order(0, 1) != first
    assert sorted(order(0, 1)) == sorted(first)


def test_loading_leaves_the_global_random_numbers_alone(cifar: ImageData, folder: Path) -> None:
    before = torch.get_rng_state()
    for images in (cifar.train, load_data(f"imagefolder:{folder}", image_size=16).train):
        for _ in images.loader(4, shuffle=True):
            pass
    assert torch.equal(torch.get_rng_state(), before)


# Augmentation -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["cifar", "digits", "folder"])
def augmented(request: pytest.FixtureRequest, cifar: ImageData, folder: Path) -> ImageSet:
    if request.param == "cifar":
        return cifar.train
    if request.param == "digits":
        return load_data("digits").train.subset(60)
    return load_data(f"imagefolder:{folder}", image_size=24).train


def test_augmentation_does_not_depend_on_the_batch(augmented: ImageSet) -> None:
    augmented.set_epoch(3)
    together, _ = whole(augmented)
    alone = torch.stack([augmented[i][0] for i in range(len(augmented))])
    assert torch.equal(together, alone)
    backwards, _ = augmented.__getitems__(range(len(augmented))[::-1])
    assert torch.equal(together, backwards.flip(0))
    in_other_processes = torch.cat([images for images, _ in augmented.loader(5, workers=2)])
    assert torch.equal(together, in_other_processes)


def test_augmentation_of_an_image_is_the_same_in_every_subset(augmented: ImageSet) -> None:
    augmented.set_epoch(2)
    smaller = augmented.subset(7)
    assert smaller.augmented
    assert smaller.epoch == 2
    places = [augmented.indices.tolist().index(i) for i in smaller.indices.tolist()]
    assert torch.equal(whole(smaller)[0], augmented.__getitems__(places)[0])


def test_augmentation_changes_with_the_epoch_and_comes_back(augmented: ImageSet) -> None:
    shown = []
    for epoch in (0, 1, 0):
        augmented.set_epoch(epoch)
        shown.append(whole(augmented)[0])
    assert torch.equal(shown[0], shown[2])
    assert not torch.equal(shown[0], shown[1])


def test_augmentation_changes_with_the_seed(hub: Path, folder: Path) -> None:
    for spec in (f"cifar10:{hub}", f"imagefolder:{folder}", "digits"):
        first, second = (load_data(spec, seed=seed, image_size=16).train for seed in (0, 1))
        common = sorted(set(first.indices.tolist()) & set(second.indices.tolist()))
        chosen = [[s.indices.tolist().index(i) for i in common] for s in (first, second)]
        assert not torch.equal(first.__getitems__(chosen[0])[0], second.__getitems__(chosen[1])[0])


def test_plain_images_stay_as_they_are(cifar: ImageData) -> None:
    plain = cifar.train.plain()
    assert not plain.augmented
    assert cifar.train.augmented
    assert not cifar.validation.augmented
    assert not cifar.test.augmented
    before, _ = whole(plain)
    plain.set_epoch(5)
    assert torch.equal(whole(plain)[0], before)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(1, 5), st.integers(3, 9), st.integers(3, 9), st.integers(0, 2**31))
def test_crop_and_flip_is_that_of_torchvision(
    padding: int, batch: int, height: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
    top, left = torch.randint(2 * padding + 1, (2, batch), generator=generator)
    mirrored = torch.rand(batch, generator=generator) < 0.5
    result = packed._crop_and_flip(pixels, top, left, mirrored, padding)
    for i in range(batch):
        expected = reference.crop(
            reference.pad(pixels[i], [padding] * 4), int(top[i]), int(left[i]), height, width
        )
        expected = reference.hflip(expected) if mirrored[i] else expected
        assert torch.equal(result[i], expected)


@pytest.mark.parametrize(
    ("name", "shift", "flips"), [("cifar", 4, True), ("digits", 1, False), ("svhn", 4, False)]
)
def test_every_shift_and_flip_is_drawn_and_no_other(
    name: str, shift: int, flips: bool, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, int, bool]] = []
    crop_and_flip = packed._crop_and_flip

    def watch(pixels: torch.Tensor, *draws: Any) -> torch.Tensor:
        drawn.extend(zip(*(draw.tolist() for draw in draws[:3]), strict=True))
        assert draws[3] == shift
        return crop_and_flip(pixels, *draws)

    monkeypatch.setattr(packed, "_crop_and_flip", watch)
    train = load_data({"cifar": f"cifar10:{hub}", "digits": "digits", "svhn": f"svhn:{hub}"}[name]).train
    for epoch in range(100):
        train.set_epoch(epoch)
        train.__getitems__(range(30))
    places = range(2 * shift + 1)
    assert set(drawn) == set(itertools.product(places, places, {False, flips}))
    mirrored = np.mean([flip for *_, flip in drawn])
    assert mirrored == (pytest.approx(0.5, abs=0.05) if flips else 0)


# Splits -----------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=200).filter(lambda x: max(np.bincount(x)) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 1000),
)
def test_hold_out_is_disjoint_complete_stratified_and_stable(
    labels: list[int], fraction: float, seed: int
) -> None:
    classes = torch.tensor(labels)
    kept, held_out = draws.hold_out(classes, fraction, seed)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(len(labels)))
    for label in set(labels):
        count = labels.count(label)
        share = int((classes[held_out] == label).sum())
        assert share <= count - 1
        if count > 1:
            assert share >= 1
            assert abs(share - fraction * count) <= 1
    again = draws.hold_out(classes, fraction, seed)
    assert torch.equal(kept, again[0])
    assert torch.equal(held_out, again[1])


def test_split_follows_the_seed(hub: Path) -> None:
    splits = {seed: load_data("digits", seed=seed) for seed in (0, 1)}
    assert not torch.equal(splits[0].validation.indices, splits[1].validation.indices)
    assert torch.equal(load_data("digits", seed=1).validation.indices, splits[1].validation.indices)
    for data in splits.values():
        assert not set(data.train.indices.tolist()) & set(data.validation.indices.tolist())
        shares = torch.bincount(data.validation.labels) / (
            torch.bincount(data.validation.labels) + torch.bincount(data.train.labels)
        )
        assert ((shares - 0.1).abs() < 0.01).all()


def test_validation_fraction_is_kept() -> None:
    data = load_data("digits", validation_fraction=0.5)
    assert abs(len(data.validation) - len(data.train)) <= 10


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 145), st.integers(0, 50))
def test_subsets_are_class_balanced(n: int, seed: int) -> None:
    images = load_data("digits").validation
    chosen = images.subset(n, seed)
    assert len(chosen) == n
    assert set(chosen.indices.tolist()) <= set(images.indices.tolist())
    assert len(set(chosen.indices.tolist())) == n
    available = torch.bincount(images.labels, minlength=10)
    counts = torch.bincount(chosen.labels, minlength=10)
    for label in range(10):  # a class has less than another only where it has no more to give
        assert counts[label] >= min(int(counts.max()) - 1, int(available[label]))
    assert torch.equal(chosen.indices, images.subset(n, seed).indices)


def test_subsets_follow_the_seed() -> None:
    images = load_data("digits").train
    assert not torch.equal(images.subset(50, seed=0).indices, images.subset(50, seed=1).indices)


# Folders of images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["val", "validation", "test"])
def test_one_other_folder_is_the_test_set(other: str, tmp_path: Path) -> None:
    data = load_data(f"imagefolder:{write_folder(tmp_path, {'train': 5, other: 2})}", image_size=16)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [12, 3, 6]
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert all(f"/{other}/" in Path(path).as_posix() for path in data.test.source.paths)
    assert data.class_names == ("cat", "dog", "emu")
    assert data.input_shape == (3, 16, 16)
    assert data.num_classes == 3


@pytest.mark.parametrize("other", ["val", "validation"])
def test_with_both_folders_nothing_is_held_out(other: str, tmp_path: Path) -> None:
    data = load_data(f"imagefolder:{write_folder(tmp_path, {'train': 4, other: 2, 'test': 3})}")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [12, 6, 9]
    assert data.train.augmented
    assert not data.validation.augmented
    assert data.input_shape == (3, 224, 224)
    assert f"/{other}/" in Path(data.validation.source.paths[0]).as_posix()


def test_plain_images_of_a_folder_are_resized_and_cut_from_the_middle(folder: Path) -> None:
    data = load_data(f"imagefolder:{folder}", image_size=28)
    image, label = data.test[3]
    assert type(image) is torch.Tensor
    assert label == 1
    expected = Image.open(folder / "val" / "dog" / "1.png")
    expected = reference.center_crop(reference.resize(expected, 32), 28)
    torch.testing.assert_close(image, normalised(reference.pil_to_tensor(expected)))


def test_augmented_images_of_a_folder_have_one_size(folder: Path) -> None:
    data = load_data(f"imagefolder:{folder}", image_size=20)
    images, labels = whole(data.train)
    assert images.shape == (15, 3, 20, 20)
    assert type(images) is torch.Tensor
    assert torch.bincount(labels).tolist() == [5, 5, 5]


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": 3, "val": 1})
    (tmp_path / "val" / "dog" / "0.png").write_bytes(b"no image")
    data = load_data(f"imagefolder:{tmp_path}", image_size=16)
    with pytest.raises(DataError, match=r"dog.0\.png cannot be read"):
        data.test[1]


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar", "data set 'cifar' is unknown; did you mean 'cifar10'"),
        ("Digits", "did you mean 'digits'"),
        ("imagenet", "did you mean|expected one of digits, cifar10, cifar100, svhn, imagefolder"),
        ("", "expected one of digits, cifar10"),
        ("cifra10:/tmp", "did you mean 'cifar10'"),
        ("digits:/tmp", "takes no folder"),
        ("cifar10:", "names no folder; write 'cifar10:PATH'"),
        ("imagefolder", "names no folder; write 'imagefolder:PATH'"),
        ("imagefolder:", "names no folder"),
        ("cifar10:/no/such/folder", "data folder /no/such/folder is missing"),
        ("imagefolder:/no/such/folder", "data folder /no/such/folder is missing"),
    ],
)
def test_specs_that_name_nothing_are_refused(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_data(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_fractions_out_of_range_are_refused(fraction: float) -> None:
    with pytest.raises(DataError, match="expected a number between 0 and 1"):
        load_data("digits", validation_fraction=fraction)


def test_other_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(DataError, match="image_size is 0; expected"):
        load_data("digits", image_size=0)
    with pytest.raises(DataError, match="data seed is -1; expected 0 or more"):
        load_data("digits", seed=-1)
    images = load_data("digits").test
    for n in (0, -1, len(images) + 1):
        with pytest.raises(DataError, match=f"subset of {n} images .* expected 1 to {len(images)}"):
            images.subset(n)


def _empty(_: Path) -> None:
    pass


def _test_shards_missing(path: Path) -> None:
    write_hub(path)
    (path / "test-00000-of-00001.parquet").unlink()


def _other_columns(path: Path) -> None:
    write_hub(path, label_column="coarse_label")


def _words_for_labels(path: Path) -> None:
    write_hub(path)
    for part in ("train-00000-of-00002", "test-00000-of-00001"):
        write_parquet(path / f"{part}.parquet", [png(random_pixels(1)[0])], ["cat"])


def _too_deep(path: Path) -> None:
    write_hub(path / "one" / "two")


@pytest.mark.parametrize(
    "fill",
    [_empty, _test_shards_missing, _other_columns, _words_for_labels, _too_deep],
    ids=lambda f: f.__name__,
)
def test_folders_in_no_known_layout_say_what_was_looked_for(
    fill: Callable[[Path], None], tmp_path: Path
) -> None:
    fill(tmp_path)
    with pytest.raises(
        DataError, match="is in no known layout for 'cifar10'; looked there and just below"
    ) as caught:
        load_data(f"cifar10:{tmp_path}")
    for word in ("cifar-10-batches-py", "train*.parquet", "test*.parquet", "img or image", "label"):
        assert word in str(caught.value)


def test_labels_of_another_data_set_are_refused(tmp_path: Path) -> None:
    write_hub(tmp_path, classes=20)
    with pytest.raises(DataError, match="training images of 'cifar10' have labels 0 to 19; expected 0 to 9"):
        load_data(f"cifar10:{tmp_path}")


def test_negative_and_missing_labels_are_refused(tmp_path: Path) -> None:
    for label in (-1, None):
        write_hub(tmp_path)
        write_parquet(tmp_path / "test-00000-of-00001.parquet", [png(random_pixels(1)[0])] * 2, [3, label])
        with pytest.raises(DataError, match="'cifar10' have labels -1 to 3|lacks the label of 1 of 2 images"):
            load_data(f"cifar10:{tmp_path}")


def test_empty_splits_are_refused(tmp_path: Path) -> None:
    write_hub(tmp_path)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [], pa.array([], pa.int64()))
    with pytest.raises(DataError, match="the test images of 'cifar10' are none"):
        load_data(f"cifar10:{tmp_path}")


def test_a_class_with_one_image_cannot_be_split(tmp_path: Path) -> None:
    write_hub(tmp_path, train=10)
    with pytest.raises(DataError, match="no validation images can be held out of 10 training images"):
        load_data(f"cifar10:{tmp_path}")


def test_damaged_parquet_files_are_named(tmp_path: Path) -> None:
    write_hub(tmp_path)
    for name in ("test-00000-of-00001.parquet", "train-00000-of-00002.parquet"):
        file = tmp_path / name
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(DataError, match=f"data file .*{name} cannot be read"):
            load_data(f"cifar10:{tmp_path}")


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (None, "image 1 of .* cannot be decoded"),
        (b"no image", "image 1 of .* cannot be decoded"),
        (png(random_pixels(1)[0])[:300], "image 1 of .* cannot be decoded"),
        (png(random_pixels(1)[0][:20]), r"image 1 of .* has shape \(3, 20, 32\); expected \(3, 32, 32\)"),
    ],
)
def test_damaged_images_are_named(encoded: bytes | None, message: str, tmp_path: Path) -> None:
    write_hub(tmp_path)
    good = png(random_pixels(1)[0])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [good, encoded], [0, 1])
    data = load_data(f"cifar10:{tmp_path}")
    with pytest.raises(DataError, match=message):
        data.test[0]


def test_pickles_with_another_checksum_are_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_torchvision_cifar(tmp_path, monkeypatch, "CIFAR10", 10)

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / "cifar-10-batches-py" / "train").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="has a cifar-10-batches-py that cannot be used .* checksums"):
        load_data(f"cifar10:{tmp_path}")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("error", [RuntimeError("File not found or corrupted."), OSError("no network")])
def test_a_failed_download_says_what_to_do(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fail)
    monkeypatch.setenv("DSCORE_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"cannot be downloaded .*{error}.* give a folder .*'cifar10:PATH'"):
        load_data("cifar10")


@pytest.mark.parametrize("module", ["sklearn.datasets", "pyarrow"])
def test_a_missing_library_is_named(module: str, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    spec = "digits" if module == "sklearn.datasets" else f"cifar10:{hub}"
    with pytest.raises(
        DataError, match=rf"{module.partition('.')[0]} is not installed.*pip install 'dscore-plugin\[data\]'"
    ):
        load_data(spec)


@pytest.mark.parametrize("parts", [{}, {"train": 2}, {"val": 2}, {"test": 2, "val": 2}])
def test_image_folders_in_no_known_layout_are_refused(parts: dict[str, int], tmp_path: Path) -> None:
    write_folder(tmp_path, parts)
    with pytest.raises(DataError, match="no known layout for 'imagefolder'; looked for train, and for val"):
        load_data(f"imagefolder:{tmp_path}")


def test_image_folders_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="train lacks images .*expected one folder of them per class"):
        load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(DataError, match="train lacks images .*cat"):
        load_data(f"imagefolder:{tmp_path}")


def test_image_folders_with_other_classes_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": 2})
    write_folder(tmp_path, {"val": 1}, classes=("cat", "dog", "fox"))
    with pytest.raises(DataError, match=r"has other classes than train \(only one of them has emu, fox\)"):
        load_data(f"imagefolder:{tmp_path}")


# The real thing ---------------------------------------------------------------------------------------------


def top1(model: torch.nn.Module, images: ImageSet) -> float:
    model.eval()
    with torch.inference_mode():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in images.loader(256))
    return 100 * right / len(images)


def test_digits_cnn_learns_the_digits_within_seconds() -> None:
    torch.manual_seed(0)
    data = load_data("digits")
    model = create_model("digits_cnn")
    epochs, steps = 8, -(-len(data.train) // 64)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, epochs * steps)
    for epoch in range(epochs):
        data.train.set_epoch(epoch)
        for images, labels in data.train.loader(64, shuffle=True):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
            schedule.step()
    assert top1(model, data.test) > 97


@pytest.fixture(scope="module")
def real(shared: Path) -> ImageData:
    return load_data(f"cifar10:{shared / 'data' / 'cifar10'}")


@pytest.mark.cifar10
def test_real_cifar10_is_whole(real: ImageData) -> None:
    assert [len(part) for part in (real.train, real.validation, real.test)] == [45_000, 5_000, 9_827]
    assert torch.bincount(real.validation.labels).tolist() == [500] * 10
    assert real.class_names[0] == "airplane"
    assert real.class_names[9] == "truck"
    images, _ = whole(real.validation.subset(1000))
    assert images.mean().abs() < 0.15
    assert abs(images.std() - 1) < 0.15


@pytest.mark.cifar10
@pytest.mark.parametrize(("name", "expected"), [("resnet20", 91.67), ("resnet56", 93.31)])
def test_trained_networks_reach_their_accuracy(
    name: str, expected: float, shared: Path, real: ImageData
) -> None:
    model = create_model(f"cifar_{name}")
    load_weights(model, shared / "weights" / "cifar10" / f"{name}.safetensors")
    assert round(top1(model, real.test), 2) == pytest.approx(expected, abs=0.011)  # one image is 0.01


@pytest.mark.cifar10
def test_trained_vgg_reaches_its_accuracy(shared: Path, real: ImageData) -> None:
    model = create_model("cifar_vgg16_bn")
    load_weights(model, shared / "weights" / "cifar10" / "vgg16_bn.safetensors")
    assert top1(model, real.test.subset(2000)) == pytest.approx(91.80, abs=1.8)  # 3 sigma of 2,000 images
