"""A small set of images and small networks, so that these tests need neither data nor the models' room."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

CLASSES = 3


class TinyImages(Dataset[Any]):
    """Noise with a bright quarter that tells the class; augmentation shifts by (seed, epoch, index)."""

    def __init__(self, images: Tensor, labels: Tensor, *, augmented: bool = False, seed: int = 0) -> None:
        self.images, self.labels = images, labels
        self.augmented, self.seed, self.epoch = augmented, seed, 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.__getitems__([index])
        return images[0], int(labels[0])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(list(indices), dtype=torch.int64)
        images = self.images[chosen]
        if self.augmented:
            images = torch.stack(
                [self._noisy(image, int(i)) for image, i in zip(images, chosen, strict=True)]
            )
        return images, self.labels[chosen]

    def _noisy(self, image: Tensor, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 10**6 + self.epoch * 10**4 + index)
        return image + 0.1 * torch.randn(image.shape, generator=generator)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def plain(self) -> TinyImages:
        return TinyImages(self.images, self.labels, seed=self.seed)

    def subset(self, n: int, seed: int = 0) -> TinyImages:
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n].sort().values
        return TinyImages(self.images[chosen], self.labels[chosen], augmented=self.augmented, seed=self.seed)

    def loader(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        workers: int = 0,
        drop_last: bool = False,
    ) -> DataLoader[Any]:
        assert not shuffle, "training orders the images itself"
        return DataLoader(
            self,
            batch_size=batch_size,
            collate_fn=lambda batch: batch,
            num_workers=workers,
            drop_last=drop_last,
        )


def tiny_images(count: int, *, augmented: bool = False, seed: int = 0) -> TinyImages:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    images = 0.5 * torch.randn(count, 3, 6, 6, generator=generator)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[:, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3] += 1
    return TinyImages(images, labels, augmented=augmented, seed=seed)


def tiny_network(*, norm: bool = True, dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """Two convolutions, the second with an odd number of channels, and a linear layer."""
    torch.manual_seed(seed)

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=not norm)]
        return [*layers, *([nn.BatchNorm2d(outputs)] if norm else []), nn.ReLU()]

    return nn.Sequential(
        *block(3, 8, 1),
        *block(8, 5, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(5, CLASSES),
    )


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


class HalfGradient:
    """A regulariser that halves the gradient of every weight, more so in every epoch."""

    def __init__(self) -> None:
        self.factor = 0.5
        self.calls = 0

    def after_backward(self, model: nn.Module) -> None:
        self.calls += 1
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.factor)

    def end_epoch(self, model: nn.Module, epoch: int) -> dict[str, float]:
        self.factor /= 2
        return {"factor": self.factor, "epoch": float(epoch)}

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor = state["factor"]


@pytest.fixture
def train_images() -> TinyImages:
    return tiny_images(50, augmented=True)


@pytest.fixture
def validation_images() -> TinyImages:
    return tiny_images(31, seed=1)
