"""Images through timm's readers and transforms: folders, WebDataset shards, data sets on the Hub.

Folders and ``hfds/`` are read at random and become an :class:`~dscore_plugin.datasets.ImageSet`, whose augmentation
is a pure function of seed, epoch and image. ``wds/`` and ``hfids/`` can only be read from the beginning: they become a
:class:`ReaderStream`, whose epochs follow from seed, epoch, number of processes and number of loader workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, get_worker_info

from dscore_plugin.datasets import ImageSet
from dscore_plugin.errors import DataError, ModelError
from dscore_plugin.randomness import own_random_numbers
from dscore_plugin.training.batches import AUGMENTATION, stream_seed

STREAMS = ("wds", "hfids")
READERS = ("", "hfds", *STREAMS)  # the first is for folders

Transform = Callable[[Any], Tensor]


def data_form(model: nn.Module | str, image_size: int | None = None) -> dict[str, Any]:
    """Return the form in which a model wants its images: size, interpolation, crop, mean and standard deviation.

    Args:
        model: one of timm's, or the name of one. An artifact knows its architecture and not the tag of its weights; a
            name with a tag, such as ``"resnet50.tv_in1k"``, knows both. What is not said is ImageNet's custom.
        image_size: height and width, if not the model's own.

    Raises:
        ModelError: if there are no weights with this tag.
    """
    import timm
    from timm.data import resolve_data_config

    known: dict[str, Any] = {"model": model}
    if isinstance(model, str):
        try:
            config = timm.get_pretrained_cfg(model)
        except RuntimeError as error:
            raise ModelError(f"model {model!r} is unknown ({error}); see timm.list_pretrained()") from error
        known = {"pretrained_cfg": config.to_dict() if config else {"input_size": (3, 224, 224)}}
    channels = resolve_data_config(**known)["input_size"][0]
    size = {} if image_size is None else {"input_size": (channels, image_size, image_size)}
    return dict(resolve_data_config(size, **known))


def load_images(
    name: str,
    root: str | None,
    split: str,
    form: Mapping[str, Any],
    *,
    training: bool = False,
    seed: int = 0,
    augmentation: Mapping[str, Any] | None = None,
    **options: Any,
) -> ImageSet | ReaderStream:
    """Open one split of a data set.

    Args:
        name: as for ``timm.data.create_dataset``: ``""`` (a folder with one folder for each class, below
            ``root/split``), ``"hfds/OWNER/NAME"``, ``"hfids/OWNER/NAME"`` (streamed), or ``"wds/NAME"`` (shards below
            ``root``). A local folder in the Hub's layout is ``"hfds//PATH"``.
        root: the folder; for the Hub the cache.
        split: its name; for shards also ``"train-{0000..0127}.tar|1281167"``, with the number of images.
        form: as :func:`data_form` gives it.
        training: whether the images are augmented, and a stream shuffled.
        seed: of the augmentation of a set; a stream takes that of the training.
        augmentation: further arguments of ``timm.data.create_transform``, such as ``auto_augment``.
        **options: further arguments of the reader, such as ``num_samples``, ``input_key`` and ``target_key``.

    Returns:
        A set, or a stream.

    Raises:
        DataError: if the reader is unknown, its package is not installed, or it finds no images.
    """
    reader = name.partition("/")[0].lower() if "/" in name else ""
    if (name and not reader) or reader not in READERS:
        raise DataError(
            f"data set {name!r} is unknown; expected '' for a folder, or hfds/NAME, hfids/NAME or wds/NAME"
        )
    options = {key: value for key, value in options.items() if value is not None}
    plain = _transform(form, {})
    augmented = _transform(form, {"is_training": True, **(augmentation or {})}) if training else plain
    if reader in STREAMS:
        return ReaderStream({"name": name, "root": root, "split": split, **options}, plain, augmented)
    found = _create({"name": name, "root": root, "split": split, **options}).reader
    if not reader and Path(found.root) == Path(root or ""):  # timm then takes all that is below
        raise DataError(f"data folder {root} has no folder {split!r}; expected {root}/{split}/CLASS/*")
    images = _ReaderImages(found, plain, augmented)
    return ImageSet(images, torch.arange(len(images.labels)), augmented=training, seed=seed)


def check_same_classes(train: ImageSet | ReaderStream, validation: ImageSet | ReaderStream) -> None:
    """Make sure that two folders number their classes alike; other readers bring their labels along.

    Raises:
        DataError: if they do not.
    """
    first, second = (
        getattr(getattr(images, "source", None), "classes", None) for images in (train, validation)
    )
    if first and second and first != second:
        odd = sorted(set(first) ^ set(second)) or sorted(first)
        raise DataError(
            f"training and validation folders have other classes (see {', '.join(odd[:3])}); expected the same in both"
        )


class ReaderStream:
    """Images that one of timm's readers gives in its own order; see :class:`dscore_plugin.training.feed.ImageStream`.

    Args:
        source: arguments of ``timm.data.create_dataset``.
        plain: transform of an evaluation.
        augmented: transform of the training.

    Raises:
        DataError: if there is no such data set, or nobody says how many images it has.
    """

    def __init__(self, source: Mapping[str, Any], plain: Transform, augmented: Transform) -> None:
        self.source, self.plain, self.augmented = dict(source), plain, augmented
        self.count = int(_create(self.source).reader.num_samples)
        if self.count < 1:
            raise DataError(f"nobody says how many images {self.source['name']!r} has; give num_samples")

    def __len__(self) -> int:
        return self.count

    def training_batches(
        self, epoch: int, batch_size: int, *, seed: int, process: int, processes: int, workers: int
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """Give a process its part of an epoch: full batches, a pure function of the arguments.

        Raises:
            DataError: if there are fewer shards than readers.
        """
        # Readers keep random numbers from one epoch to the next; a new one begins where a resumed run would.
        dataset = _create(
            {**self.source, "is_training": True, "batch_size": batch_size, "seed": stream_seed(seed, epoch)}
        )
        shards = _shards(dataset.reader)
        readers = processes * max(1, workers)
        if shards is not None and len(shards) < readers:
            raise DataError(
                f"{len(shards)} shards cannot feed {processes} processes x {max(1, workers)} workers; use fewer "
                "workers, or smaller shards"
            )
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = process, processes
        dataset.set_loader_cfg(num_workers=workers)
        dataset.set_epoch(epoch)
        dataset.transform = _Seeded(self.augmented, seed, epoch, process)
        generator = torch.Generator().manual_seed(stream_seed(seed, epoch, 1 + process, AUGMENTATION))
        return _loader(dataset, batch_size, workers, generator, drop_last=True)

    def evaluation_batches(
        self, batch_size: int, *, process: int, processes: int, workers: int
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """Give a process its part of the images as they are; all parts together are every image once."""
        dataset = _create({**self.source, "is_training": False, "batch_size": batch_size})
        shards = _shards(dataset.reader)
        if shards is None:
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = process, processes
        else:  # by itself, the reader of shards repeats some images and leaves out others to give each process as many
            mine = shards[process::processes]
            if not mine:
                return []
            dataset.reader.split_info.filenames = mine
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1
            dataset.reader.num_samples = math.ceil(self.count * len(mine) / len(shards))
        dataset.set_loader_cfg(num_workers=workers)
        dataset.transform = self.plain
        return _loader(dataset, batch_size, workers, torch.Generator(), drop_last=False)


class _ReaderImages:
    """Images that a reader gives at random, decoded anew each time."""

    def __init__(self, reader: Any, plain: Transform, augmented: Transform) -> None:
        self.reader, self._plain, self._augmented = reader, plain, augmented
        self.labels = torch.tensor(_labels(reader), dtype=torch.int64)
        self.classes = dict(getattr(reader, "class_to_idx", None) or {})

    def plain(self, indices: Tensor) -> Tensor:
        return torch.stack([self._plain(self._open(index)) for index in indices.tolist()])

    def augmented(self, indices: Tensor, seed: int, epoch: int) -> Tensor:
        images = []
        with own_random_numbers() as reseed:
            for index in indices.tolist():
                reseed(stream_seed(seed, epoch, index, AUGMENTATION))
                images.append(self._augmented(self._open(index)))
        return torch.stack(images)

    def _open(self, index: int) -> Image.Image:
        # Not ImageDataset's way, which shows the next image, with its label, where one is damaged.
        try:
            file, _ = self.reader[index]
            with file, Image.open(file) as image:
                return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"image {index} ({self.reader.filename(index)}) cannot be read ({error}); replace it or take it away"
            ) from error


class _Seeded:
    """A transform that draws the same random numbers for the n-th image of a loader process, whatever came before."""

    def __init__(self, transform: Transform, seed: int, epoch: int, process: int) -> None:
        self.transform, self.stream, self.count = transform, (seed, epoch, 1 + process, AUGMENTATION), 0

    def __call__(self, image: Any) -> Tensor:
        worker = get_worker_info()
        self.count += 1
        with own_random_numbers() as reseed:
            reseed(stream_seed(*self.stream, worker.id if worker else 0, self.count))
            return self.transform(image)


def _create(arguments: Mapping[str, Any]) -> Any:
    """Call ``timm.data.create_dataset``, in the project's words where it fails."""
    from timm.data import create_dataset

    try:
        return create_dataset(**arguments)
    except ImportError as error:
        raise DataError(
            "the package 'datasets' is not installed; pip install 'dscore-plugin[streams]'"
        ) from error
    except (RuntimeError, AssertionError, ValueError, OSError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [f"{type(error).__name__}, perhaps a missing folder"])[0]
        hint = (
            "pip install 'dscore-plugin[streams]'"
            if "webdataset" in reason
            else "check its name, root and split"
        )
        raise DataError(
            f"data set {arguments['name']!r}, root {arguments['root']!r}, split {arguments['split']!r} cannot be "
            f"opened ({reason}); {hint}"
        ) from error


def _transform(form: Mapping[str, Any], options: Mapping[str, Any]) -> Transform:
    from timm.data import create_transform

    transform: Transform = create_transform(**form, **options)
    return transform


def _labels(reader: Any) -> list[int]:
    """Return the label of every image, without reading the images."""
    if hasattr(reader, "samples"):
        return [int(label) for _, label in reader.samples]
    return list(map(int, reader.dataset.with_format("numpy")[reader.label_key][:]))


def _shards(reader: Any) -> list[str] | None:
    """Return the names of the shards, where the reader divides them itself."""
    names = getattr(getattr(reader, "split_info", None), "filenames", None)
    return None if names is None else list(names)


def _loader(
    dataset: Any, batch_size: int, workers: int, generator: torch.Generator, *, drop_last: bool
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        generator=generator,  # seeds the workers, which order their images by it
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
    )
