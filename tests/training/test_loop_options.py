"""Parts of a batch, mixed images and the average of the weights: what they compute, and that a resumed run agrees."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import Mixup
from torch import Tensor, nn

from dscore_plugin.errors import DataError, TrainingError
from dscore_plugin.training.batches import MIXING, shuffled_batches, stream_seed
from dscore_plugin.training.checkpoint import load_checkpoint
from dscore_plugin.training.config import TrainingConfig, learning_rate_at
from dscore_plugin.training.evaluation import evaluate
from dscore_plugin.training.loop import train
from dscore_plugin.training.progress import Advance
from tests.training.conftest import (
    CLASSES,
    HalfGradient,
    TinyImages,
    assert_same_bits,
    snapshot,
    tiny_images,
    tiny_network,
)

CONFIG = TrainingConfig(epochs=3, learning_rate=0.05, batch_size=16, precision="float32")
EVERYTHING: list[dict[str, Any]] = [
    {"accumulate": 3},
    {"ema": 0.9},
    {"mixup": 0.4},
    {"cutmix": 1.0, "label_smoothing": 0.1},
    {"accumulate": 2, "mixup": 0.4, "cutmix": 1.0, "ema": 0.99, "precision": "auto"},
]


def assert_close(actual: nn.Module, expected: nn.Module) -> None:
    for name, tensor in expected.state_dict().items():
        assert torch.allclose(actual.state_dict()[name], tensor, rtol=1e-4, atol=1e-6), name


# --- parts of a batch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"label_smoothing": 0.1, "batch_size": 7}, {"mixup": 0.4}])
@pytest.mark.parametrize("accumulate", [2, 5])
def test_parts_add_up_to_the_batch(
    train_images: TinyImages, changes: dict[str, Any], accumulate: int
) -> None:
    config = replace(CONFIG, **changes)
    whole, parts = tiny_network(norm=False), tiny_network(norm=False)
    expected = train(whole, train_images, None, config, regularizer=HalfGradient())
    found = train(
        parts, train_images, None, replace(config, accumulate=accumulate), regularizer=HalfGradient()
    )
    assert_close(parts, whole)
    for one, other in zip(expected.history, found.history, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert (other.train_top1, other.learning_rate) == (one.train_top1, one.learning_rate)


def test_no_more_than_a_part_is_in_the_model_at_once(train_images: TinyImages) -> None:
    model, sizes = tiny_network(), []
    model.register_forward_hook(
        lambda module, inputs, output: sizes.append((module.training, len(inputs[0])))
    )
    regularizer = HalfGradient()
    train(model, train_images, None, replace(CONFIG, epochs=1, accumulate=4), regularizer=regularizer)
    assert regularizer.calls == 4
    assert [size for training, size in sizes if training] == [4] * 12 + [2] * 4  # 50 images: 16, 16, 16, 2


def test_the_teacher_sees_the_same_parts(train_images: TinyImages) -> None:
    config = replace(CONFIG, distill=0.5, distill_features=10.0)
    whole, parts, teacher = (tiny_network(norm=False, seed=seed) for seed in (0, 0, 4))
    train(whole, train_images, None, config, teacher=teacher)
    train(parts, train_images, None, replace(config, accumulate=2), teacher=teacher)
    assert_close(parts, whole)


# --- mixed images ----------------------------------------------------------------------------------------


def train_mixed_literally(model: nn.Module, images: TinyImages, config: TrainingConfig) -> None:
    """Plain descent on batches mixed by timm, whose random numbers are seeded by hand."""
    mix = Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=CLASSES)
    taken = 0
    for epoch in range(config.epochs):
        images.set_epoch(epoch)
        model.train()
        batches = shuffled_batches(len(images), config.batch_size, config.seed, epoch)
        for step, batch in enumerate(batches):
            inputs, labels = images.__getitems__(batch)
            np.random.seed(stream_seed(config.seed, epoch, step, MIXING))
            inputs, targets = mix(inputs, labels)
            loss = -(targets * model(inputs).log_softmax(dim=1)).sum(dim=1).mean()
            parameters = list(model.parameters())
            gradients = torch.autograd.grad(loss, parameters)
            rate = learning_rate_at(config, taken, len(batches))
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= rate * gradient
            taken += 1


@pytest.mark.parametrize(
    "changes", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1}]
)
def test_mixed_training_is_timms_mixture_and_the_textbooks_descent(
    train_images: TinyImages, changes: dict[str, Any]
) -> None:
    config = replace(CONFIG, momentum=0.0, weight_decay=0.0, **changes)
    model, reference, plain = tiny_network(), tiny_network(), tiny_network()
    train(model, train_images, None, config)
    train_mixed_literally(reference, train_images, config)
    assert_close(model, reference)
    train(plain, train_images, None, replace(config, mixup=0.0, cutmix=0.0))
    assert not torch.allclose(plain[9].weight, model[9].weight, rtol=1e-3)


def test_an_odd_last_batch_leaves_one_image_out() -> None:
    sizes: list[int] = []
    model = tiny_network()
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    train(model, tiny_images(37), None, replace(CONFIG, epochs=1, mixup=0.4))
    assert sizes == [16, 16, 4]


# --- the average of the weights --------------------------------------------------------------------------


class Steps:
    """A progress that remembers a model's state after every step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.states: list[dict[str, Tensor]] = []

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        yield lambda steps=1, **numbers: self.states.append(snapshot(self.model)) if numbers else None


def test_the_average_is_the_formula_and_what_is_evaluated_and_returned(
    train_images: TinyImages,
) -> None:
    model, raw, validation_images = tiny_network(), tiny_network(), tiny_images(300, seed=1)
    steps = Steps(model)
    config = replace(CONFIG, ema=0.6, learning_rate=0.2)
    result = train(model, train_images, validation_images, config, progress=steps)
    assert len(steps.states) == 12
    average = {name: tensor.double() for name, tensor in steps.states[0].items()}
    for number, state in enumerate(steps.states[1:], start=2):
        decay = min(0.6, 1 - number ** (-2 / 3))
        average = {name: decay * average[name] + (1 - decay) * state[name] for name in state}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor.double(), average[name], rtol=1e-4, atol=1e-6), name
    train(raw, train_images, None, replace(config, ema=0.0))
    assert_same_bits(steps.states[-1], raw.state_dict())  # training itself does not see the average
    found = [evaluate(network, validation_images).top1 for network in (model, raw)]
    assert result.final.validation_top1 == found[0] != found[1]


def test_the_average_needs_weights_that_nobody_else_steers(train_images: TinyImages) -> None:
    with pytest.raises(TrainingError, match="ema averages weights"):
        train(tiny_network(), train_images, None, replace(CONFIG, ema=0.9), regularizer=HalfGradient())


# --- resuming --------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Stands for a process that ends in the middle of a line."""


class CrashingImages(TinyImages):
    crash_epoch = -1

    def __getitems__(self, indices: Any) -> tuple[Tensor, Tensor]:
        if self.epoch == self.crash_epoch:
            raise Crash
        return super().__getitems__(indices)


def crashing(images: TinyImages, epoch: int) -> CrashingImages:
    made = CrashingImages(images.images, images.labels, augmented=images.augmented, seed=images.seed)
    made.crash_epoch = epoch
    return made


@pytest.mark.parametrize("changes", EVERYTHING)
def test_a_resumed_run_ends_with_the_same_bits(
    train_images: TinyImages, validation_images: TinyImages, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = replace(CONFIG, **changes)
    expected, model, folder = tiny_network(dropout=0.3), tiny_network(dropout=0.3), tmp_path / "run"
    history = train(expected, train_images, validation_images, config).history
    with pytest.raises(Crash):
        train(model, crashing(train_images, 2), validation_images, config, checkpoint=folder)
    saved = load_checkpoint(folder)
    assert saved is not None
    assert (saved.ema is not None) == (config.ema > 0)
    model = tiny_network(dropout=0.3, seed=99)
    result = train(model, train_images, validation_images, config, checkpoint=folder, resume=True)
    assert_same_bits(model.state_dict(), expected.state_dict())
    assert [replace(r, seconds=0) for r in result.history] == [replace(r, seconds=0) for r in history]
    again = tiny_network(dropout=0.3, seed=98)
    train(again, train_images, validation_images, config, checkpoint=folder, resume=True)
    assert_same_bits(again.state_dict(), expected.state_dict())  # a finished run is only loaded


@pytest.mark.parametrize(
    ("name", "value"), [("accumulate", 2), ("ema", 0.9), ("mixup", 0.1), ("cutmix", 0.1)]
)
def test_a_changed_option_is_refused(train_images: TinyImages, tmp_path: Path, name: str, value: Any) -> None:
    config = replace(CONFIG, epochs=1)
    train(tiny_network(), train_images, None, config, checkpoint=tmp_path / "run")
    with pytest.raises(TrainingError, match=f"cannot resume: {name} differs"):
        train(
            tiny_network(), train_images, None, replace(config, **{name: value}),
            checkpoint=tmp_path / "run", resume=True,
        )  # fmt: skip


# --- streams ---------------------------------------------------------------------------------------------


class TinyStream:
    """Shards of a set, each read in an order that follows from seed and epoch; endless while training."""

    def __init__(self, images: TinyImages, length: int | None = None) -> None:
        self.images, self.length = images, length

    def __len__(self) -> int:
        return len(self.images) if self.length is None else self.length

    def training_batches(
        self, epoch: int, batch_size: int, *, seed: int, process: int, processes: int, workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(stream_seed(seed, epoch))
        order = torch.randperm(len(self.images), generator=generator)[process::processes].tolist()
        numbers = itertools.cycle(order)
        while True:
            yield self.images.__getitems__([next(numbers) for _ in range(batch_size)])

    def evaluation_batches(
        self, batch_size: int, *, process: int, processes: int, workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        mine = list(range(len(self.images)))[process::processes]
        for first in range(0, len(mine), batch_size):
            yield self.images.__getitems__(mine[first : first + batch_size])


def test_a_stream_is_trained_and_evaluated_on(
    train_images: TinyImages, validation_images: TinyImages, tmp_path: Path
) -> None:
    config = replace(CONFIG, epochs=12, learning_rate=0.1)
    model = tiny_network()
    stream, held_out = TinyStream(train_images), TinyStream(validation_images, length=1000)
    result = train(model, stream, held_out, config, checkpoint=tmp_path / "run")
    assert result.final.train_top1 > 90
    assert result.final.learning_rate == learning_rate_at(config, 12 * 3 - 1, 3)  # 50 images: 16, 16, 16
    assert (
        result.final.validation_top1 == evaluate(model, validation_images).top1
    )  # whatever length was claimed
    with pytest.raises(TrainingError, match="reading of the stream differs"):
        train(model, stream, None, replace(config, workers=1), checkpoint=tmp_path / "run", resume=True)


def test_a_stream_without_images_to_evaluate_on_is_named(train_images: TinyImages) -> None:
    with pytest.raises(DataError, match="gave no image"):
        train(tiny_network(), train_images, TinyStream(tiny_images(0), length=5), replace(CONFIG, epochs=1))
