from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin.errors import DataError, ModelError, TrainingError
from dscore_plugin.training import loop as room
from dscore_plugin.training import precision
from dscore_plugin.training.batches import shuffled_batches
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


def train_literally(model: nn.Module, images: TinyImages, config: TrainingConfig) -> list[float]:
    """SGD with momentum, Nesterov's variant, weight decay and label smoothing, as in the textbooks."""
    parameters = list(model.parameters())
    velocity: list[Tensor | None] = [None] * len(parameters)
    step, losses = 0, []
    for epoch in range(config.epochs):
        images.set_epoch(epoch)
        model.train()
        batches = shuffled_batches(len(images), config.batch_size, config.seed, epoch)
        total = 0.0
        for batch in batches:
            inputs, labels = images.__getitems__(batch)
            target = functional.one_hot(labels, CLASSES) * (1 - config.label_smoothing)
            target = target + config.label_smoothing / CLASSES
            loss = -(target * model(inputs).log_softmax(dim=1)).sum(dim=1).mean()
            gradients = torch.autograd.grad(loss, parameters)
            rate = learning_rate_at(config, step, len(batches))
            with torch.no_grad():
                for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                    decayed = gradient + config.weight_decay * parameter
                    previous = velocity[i]
                    moved = decayed if previous is None else config.momentum * previous + decayed
                    velocity[i] = moved
                    parameter -= rate * (decayed + config.momentum * moved if config.nesterov else moved)
            total += loss.item() * len(batch)
            step += 1
        losses.append(total / sum(map(len, batches)))
    return losses


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"nesterov": True, "weight_decay": 0.01},
        {"label_smoothing": 0.2, "schedule": "steps", "milestones": (1, 2), "warmup_epochs": 1},
        {"momentum": 0.0, "schedule": "constant", "batch_size": 64},
        {"batch_size": 7, "seed": 5},
    ],
)
def test_training_is_the_textbooks_descent(train_images: TinyImages, changes: dict[str, Any]) -> None:
    config = replace(CONFIG, **changes)
    model, reference = tiny_network(), tiny_network()
    result = train(model, train_images, None, config)
    losses = train_literally(reference, train_images, config)
    assert [record.loss for record in result.history] == pytest.approx(losses, rel=1e-4)
    for actual, expected in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-4)


def test_a_network_learns_and_the_history_tells(
    train_images: TinyImages, validation_images: TinyImages
) -> None:
    model = tiny_network()
    config = replace(CONFIG, epochs=12, learning_rate=0.1)
    result = train(model, train_images, validation_images, config)
    assert [record.epoch for record in result.history] == list(range(1, 13))
    assert result.history[0].loss > 2 * result.final.loss
    assert result.final.train_top1 > 90
    assert result.final is result.history[-1]
    assert result.final.validation_top1 == evaluate(model, validation_images).top1
    assert result.final.learning_rate == learning_rate_at(config, 12 * 4 - 1, 4)
    assert all(record.seconds > 0 for record in result.history)
    assert result.rows()[-1]["train_top1"] == result.final.train_top1


def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before(train_images: TinyImages) -> None:
    states = []
    for seed in (3, 3, 4):
        model = tiny_network(dropout=0.3)
        torch.randn(7), random.random(), np.random.rand()
        train(model, train_images, None, replace(CONFIG, seed=seed))
        states.append(snapshot(model))
    assert_same_bits(states[0], states[1])
    assert not states[0]["9.weight"].equal(states[2]["9.weight"])


def test_every_epoch_reseeds_all_random_numbers(train_images: TinyImages) -> None:
    class Draws(HalfGradient):
        def __init__(self) -> None:
            super().__init__()
            self.drawn: list[tuple[float, float, float]] = []

        def after_backward(self, model: nn.Module) -> None:
            self.drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))

    runs = []
    for _ in range(2):
        draws = Draws()
        train(tiny_network(), train_images, None, CONFIG, regularizer=draws)
        runs.append(draws.drawn)
        random.random(), np.random.rand(), torch.rand(3)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == len(runs[0])


def test_loader_processes_do_not_change_the_result(train_images: TinyImages) -> None:
    states = []
    for workers in (0, 2):
        model = tiny_network(dropout=0.3)
        train(model, train_images, None, replace(CONFIG, epochs=2, workers=workers))
        states.append(snapshot(model))
    assert_same_bits(states[0], states[1])


def test_frozen_parameters_are_not_touched(train_images: TinyImages) -> None:
    model = tiny_network()
    for name in ("0.weight", "1.bias"):
        model.get_parameter(name).requires_grad = False
    before = snapshot(model)
    train(model, train_images, None, replace(CONFIG, weight_decay=0.1))
    after = model.state_dict()
    for name, parameter in model.named_parameters():
        assert after[name].equal(before[name]) is not parameter.requires_grad, name


@pytest.mark.parametrize(("every", "evaluated"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_validation_runs_when_due_and_after_the_last_epoch(
    train_images: TinyImages, validation_images: TinyImages, every: int, evaluated: list[int]
) -> None:
    config = replace(CONFIG, epochs=5, validate_every=every)
    history = train(tiny_network(), train_images, validation_images, config).history
    assert [record.epoch for record in history if record.validation_top1 is not None] == evaluated


def test_validation_does_not_change_the_weights(
    train_images: TinyImages, validation_images: TinyImages
) -> None:
    states = []
    for validation in (None, validation_images):
        model = tiny_network(dropout=0.3)
        train(model, train_images, validation, CONFIG)
        states.append(snapshot(model))
    assert_same_bits(states[0], states[1])


def assert_as_it_came(model: nn.Module) -> None:
    assert "forward" not in vars(model)
    assert not [name for name in vars(model) if "accelerate" in name or "original" in name]
    assert not any(module.training for module in model.modules())
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert next(model.parameters()).device.type == "cpu"
    copy.deepcopy(model)(torch.randn(2, 3, 6, 6))


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_the_model_comes_back_as_it_was(
    train_images: TinyImages, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    model = tiny_network()
    parameters = list(model.parameters())
    seen: list[tuple[torch.dtype, bool]] = []
    hook = model[3].register_forward_hook(
        lambda module, inputs, output: seen.append((output.dtype, module.weight.is_contiguous()))
    )
    result = train(model, train_images, None, replace(CONFIG, epochs=8, learning_rate=0.1, precision=kind))
    hook.remove()
    expected = precision.choose_precision(kind, torch.device("cpu"))
    assert set(seen) == {(torch.bfloat16 if expected.bfloat16 else torch.float32, not expected.channels_last)}
    assert result.final.train_top1 > 80
    assert_as_it_came(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    assert torch.backends.cudnn.deterministic is False


def test_validation_is_in_float32_while_training_in_bfloat16(
    train_images: TinyImages, validation_images: TinyImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    model, kinds = tiny_network(), set()
    model[0].register_forward_hook(lambda module, inputs, output: kinds.add((module.training, output.dtype)))
    train(model, train_images, validation_images, replace(CONFIG, epochs=1, precision="bfloat16"))
    assert kinds == {(True, torch.bfloat16), (False, torch.float32)}


def test_bfloat16_is_refused_where_the_hardware_has_none(
    train_images: TinyImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    with pytest.raises(TrainingError, match="bfloat16"):
        train(tiny_network(), train_images, None, replace(CONFIG, precision="bfloat16"))


def test_processes_that_do_not_know_of_each_other_are_refused(
    train_images: TinyImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="2 processes were launched but accelerate works with 1"):
        train(tiny_network(), train_images, None, CONFIG)


def test_accelerate_with_mixed_precision_is_refused(
    train_images: TinyImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise ValueError("AcceleratorState has already been initialized")

    monkeypatch.setattr(room, "Accelerator", refuse)
    with pytest.raises(TrainingError, match="mixed precision"):
        train(tiny_network(), train_images, None, CONFIG)


def test_the_device_that_is_asked_for_comes_before_accelerates(
    train_images: TinyImages, validation_images: TinyImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, model = tiny_network(), tiny_network()
    train(expected, train_images, validation_images, CONFIG)
    monkeypatch.setattr(room.Accelerator, "device", property(lambda self: torch.device("meta")))
    train(model, train_images, validation_images, CONFIG, device=torch.device("cpu"))
    assert_same_bits(model.state_dict(), expected.state_dict())


# --- checkpoints -----------------------------------------------------------------------------------------


class Crash(BaseException):
    """Stands for a process that ends in the middle of a line."""


class CrashingImages(TinyImages):
    """Ends the process at the given batch of the given epoch."""

    crash: tuple[int, int] = (-1, -1)
    error: type[BaseException] = Crash
    read = 0

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.read = 0

    def __getitems__(self, indices: Any) -> tuple[Tensor, Tensor]:
        self.read += 1
        if (self.epoch, self.read) == self.crash:
            raise self.error
        return super().__getitems__(indices)


def crashing(
    images: TinyImages, epoch: int, batch: int, error: type[BaseException] = Crash
) -> CrashingImages:
    made = CrashingImages(images.images, images.labels, augmented=images.augmented, seed=images.seed)
    made.crash, made.error = (epoch, batch), error
    return made


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def uninterrupted(images: TinyImages, validation: TinyImages, config: TrainingConfig) -> tuple[Any, Any]:
    model = tiny_network(dropout=0.3)
    result = train(model, images, validation, config, regularizer=HalfGradient())
    return snapshot(model), without_times(result.rows())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"nesterov": True, "schedule": "steps", "milestones": (2,)},
        {"momentum": 0.0},
        {"precision": "auto"},
    ],
)
@pytest.mark.parametrize("error", [Crash, KeyboardInterrupt])
def test_resuming_after_a_crash_gives_the_same_bits(
    train_images: TinyImages,
    validation_images: TinyImages,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[BaseException],
) -> None:
    config = replace(CONFIG, epochs=4, **changes)
    expected, history = uninterrupted(train_images, validation_images, config)
    folder = tmp_path / "run"
    model = tiny_network(dropout=0.3)
    for epoch in (2, 3):  # the run is cut off twice, each time in the middle of an epoch
        cut = crashing(train_images, epoch, 3, error)
        with pytest.raises(error):
            train(
                model,
                cut,
                validation_images,
                config,
                checkpoint=folder,
                resume=epoch == 3,
                regularizer=HalfGradient(),
            )
        assert_as_it_came(model)
        saved = load_checkpoint(folder)
        assert saved is not None
        assert len(saved.history) == epoch
        model = tiny_network(dropout=0.3, seed=99)  # another process would start from other weights
    result = train(
        model,
        train_images,
        validation_images,
        config,
        checkpoint=folder,
        resume=True,
        regularizer=HalfGradient(),
    )
    assert_same_bits(model.state_dict(), expected)
    assert without_times(result.rows()) == history


def test_resuming_after_a_crash_while_writing_gives_the_same_bits(
    train_images: TinyImages, validation_images: TinyImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, history = uninterrupted(train_images, validation_images, CONFIG)
    folder = tmp_path / "run"
    renamed: list[Path] = []
    rename = Path.rename

    def crash_between_the_renames(path: Path, target: Path) -> Path:
        renamed.append(path)
        if len(renamed) == 3:  # partial -> folder; then folder -> previous, and here partial -> folder
            raise Crash
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash_between_the_renames)
        patch.setattr("dscore_plugin.training.checkpoint._undo", lambda *paths: None)
        with pytest.raises(Crash):
            train(
                tiny_network(dropout=0.3),
                train_images,
                validation_images,
                CONFIG,
                checkpoint=folder,
                regularizer=HalfGradient(),
            )
    assert not folder.exists()
    model = tiny_network(dropout=0.3, seed=99)
    with pytest.raises(TrainingError, match="earlier run"):
        train(model, train_images, validation_images, CONFIG, checkpoint=folder, regularizer=HalfGradient())
    result = train(
        model,
        train_images,
        validation_images,
        CONFIG,
        checkpoint=folder,
        resume=True,
        regularizer=HalfGradient(),
    )
    assert_same_bits(model.state_dict(), expected)
    assert without_times(result.rows()) == history
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_finished_run_is_only_loaded(train_images: TinyImages, tmp_path: Path) -> None:
    model, again = tiny_network(), tiny_network(seed=1)
    first = train(model, train_images, None, CONFIG, checkpoint=tmp_path / "run")
    second = train(again, train_images, None, CONFIG, checkpoint=tmp_path / "run", resume=True)
    assert_same_bits(again.state_dict(), model.state_dict())
    assert first == second


def test_a_constant_schedule_can_be_prolonged(train_images: TinyImages, tmp_path: Path) -> None:
    config = replace(CONFIG, schedule="constant")
    short, long = replace(config, epochs=2), replace(config, epochs=4)
    expected, model = tiny_network(), tiny_network()
    train(expected, train_images, None, long)
    train(model, train_images, None, short, checkpoint=tmp_path / "run")
    train(model, train_images, None, long, checkpoint=tmp_path / "run", resume=True)
    assert_same_bits(model.state_dict(), expected.state_dict())


def test_resume_starts_anew_where_nothing_was_saved(train_images: TinyImages, tmp_path: Path) -> None:
    result = train(tiny_network(), train_images, None, CONFIG, checkpoint=tmp_path / "run", resume=True)
    assert len(result.history) == 3


def test_a_relative_folder_and_a_link_work(
    train_images: TinyImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    monkeypatch.chdir(tmp_path)
    train(tiny_network(), train_images, None, CONFIG, checkpoint=Path("link"))
    assert load_checkpoint(tmp_path / "target") is not None
    assert (tmp_path / "link").is_symlink()


def test_an_existing_checkpoint_is_not_overwritten(train_images: TinyImages, tmp_path: Path) -> None:
    train(tiny_network(), train_images, None, CONFIG, checkpoint=tmp_path / "run")
    before = (tmp_path / "run" / "state.json").read_bytes()
    with pytest.raises(TrainingError, match="pass resume=True"):
        train(tiny_network(), train_images, None, CONFIG, checkpoint=tmp_path / "run")
    assert (tmp_path / "run" / "state.json").read_bytes() == before


def test_resuming_otherwise_is_refused_before_anything_changes(
    train_images: TinyImages, tmp_path: Path
) -> None:
    train(tiny_network(), train_images, None, CONFIG, checkpoint=tmp_path / "run")
    model = tiny_network(seed=1)
    before = snapshot(model)
    tries: list[tuple[str, Callable[[], object]]] = []

    def attempt(message: str, images: TinyImages = train_images, **changes: Any) -> None:
        regularizer = changes.pop("regularizer", None)
        config = replace(CONFIG, **changes)
        tries.append(
            (
                message,
                lambda: train(
                    model,
                    images,
                    None,
                    config,
                    checkpoint=tmp_path / "run",
                    resume=True,
                    regularizer=regularizer,
                ),
            )
        )

    attempt("learning_rate differs", learning_rate=0.06)
    attempt("epochs differs", epochs=4)
    attempt("training images differs", images=tiny_images(49))
    attempt("regularizer differs", regularizer=HalfGradient())
    for message, call in tries:
        with pytest.raises(TrainingError, match=message):
            call()
    other = tiny_network()
    other[9] = nn.Linear(5, 4)
    with pytest.raises(TrainingError, match="parameter '9.weight' differs"):
        train(other, train_images, None, CONFIG, checkpoint=tmp_path / "run", resume=True)
    assert_same_bits(model.state_dict(), before)


def test_resume_needs_a_folder(train_images: TinyImages) -> None:
    with pytest.raises(TrainingError, match="checkpoint=FOLDER"):
        train(tiny_network(), train_images, None, CONFIG, resume=True)


# --- regularisers ----------------------------------------------------------------------------------------


def test_a_regularizer_acts_between_backward_and_step(train_images: TinyImages) -> None:
    """Plain descent with halved gradients is descent at half the rate, as long as nothing else sees them."""
    config = replace(CONFIG, epochs=1, momentum=0.0, weight_decay=0.0)
    model, reference, regularizer = tiny_network(), tiny_network(), HalfGradient()
    result = train(model, train_images, None, config, regularizer=regularizer)
    train(reference, train_images, None, replace(config, learning_rate=config.learning_rate / 2))
    for name, tensor in reference.state_dict().items():
        assert torch.allclose(model.state_dict()[name], tensor, atol=1e-6), name
    assert regularizer.calls == 4
    assert result.final.regularizer == {"factor": 0.25, "epoch": 0.0}


def test_the_end_of_an_epoch_comes_before_its_evaluation_and_checkpoint(
    train_images: TinyImages, validation_images: TinyImages, tmp_path: Path
) -> None:
    class Constant(HalfGradient):
        def end_epoch(self, model: nn.Module, epoch: int) -> dict[str, float]:
            with torch.no_grad():
                model[9].weight.zero_()
                model[9].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
            return {}

    result = train(
        tiny_network(),
        train_images,
        validation_images,
        replace(CONFIG, epochs=1),
        checkpoint=tmp_path / "run",
        regularizer=Constant(),
    )
    expected = 100 * float((validation_images.labels == 1).double().mean())
    assert result.final.validation_top1 == pytest.approx(expected)
    saved = load_checkpoint(tmp_path / "run")
    assert saved is not None
    assert not saved.weights["9.weight"].any()


# --- progress --------------------------------------------------------------------------------------------


def test_progress_shows_the_remaining_steps_and_the_numbers(
    train_images: TinyImages, validation_images: TinyImages, tmp_path: Path
) -> None:
    class Recorded:
        def __init__(self) -> None:
            self.tasks: dict[str, list[int]] = {}
            self.numbers: dict[str, float] = {}

        @contextmanager
        def task(self, name: str, total: int) -> Iterator[Advance]:
            self.tasks.setdefault(name, []).append(total)
            done = 0

            def advance(steps: int = 1, **numbers: float) -> None:
                nonlocal done
                done += steps
                self.numbers.update(numbers)

            yield advance
            assert done == total

    recorded, config = Recorded(), replace(CONFIG, schedule="constant")
    result = train(
        tiny_network(),
        train_images,
        validation_images,
        config,
        checkpoint=tmp_path / "run",
        progress=recorded,
    )
    assert recorded.tasks == {"training": [12], "evaluating": [1, 1, 1]}
    final = result.final
    assert recorded.numbers == {"epoch": 3, "loss": final.loss, "top1": final.train_top1}
    resumed = Recorded()
    train(
        tiny_network(),
        train_images,
        None,
        replace(config, epochs=5),
        checkpoint=tmp_path / "run",
        resume=True,
        progress=resumed,
    )
    assert resumed.tasks == {"training": [8]}


def test_nothing_is_printed_without_progress(
    train_images: TinyImages, capfd: pytest.CaptureFixture[str]
) -> None:
    train(tiny_network(), train_images, None, CONFIG)
    assert capfd.readouterr() == ("", "")


# --- bad input -------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_epoch(
    train_images: TinyImages, tmp_path: Path
) -> None:
    class Poison(HalfGradient):
        def after_backward(self, model: nn.Module) -> None:
            super().after_backward(model)
            if self.calls == 4 + 2:  # the second step of the second epoch
                model[9].bias.grad.fill_(math.inf)

    model = tiny_network()
    with pytest.raises(
        TrainingError, match="the loss is nan at epoch 2, step 3 of 4; lower learning_rate=0.05"
    ):
        train(model, train_images, None, CONFIG, checkpoint=tmp_path / "run", regularizer=Poison())
    saved = load_checkpoint(tmp_path / "run")
    assert saved is not None
    assert len(saved.history) == 1
    assert all(bool(tensor.isfinite().all()) for tensor in saved.weights.values())
    assert not any(module.training for module in model.modules())


def test_weights_that_are_not_finite_after_the_last_step_stop(
    train_images: TinyImages, tmp_path: Path
) -> None:
    class Poison(HalfGradient):
        def after_backward(self, model: nn.Module) -> None:
            super().after_backward(model)
            if self.calls == 12:
                model[9].bias.grad.fill_(math.nan)

    with pytest.raises(TrainingError, match=r"'9.bias' holds NaN or infinity after epoch 3"):
        train(tiny_network(), train_images, None, CONFIG, checkpoint=tmp_path / "run", regularizer=Poison())
    saved = load_checkpoint(tmp_path / "run")
    assert saved is not None
    assert len(saved.history) == 2


def test_empty_sets_are_refused(train_images: TinyImages) -> None:
    for train_set, validation_set in ((tiny_images(0), None), (train_images, tiny_images(0))):
        with pytest.raises(DataError, match="empty"):
            train(tiny_network(), train_set, validation_set, CONFIG)


@pytest.mark.parametrize(
    ("images", "batch_size", "steps"), [(17, 16, 1), (18, 16, 2), (5, 128, 1), (4, 3, 1)]
)
def test_small_sets_and_last_batches_train_with_batch_norm(images: int, batch_size: int, steps: int) -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, CLASSES))
    regularizer = HalfGradient()
    train(
        model,
        tiny_images(images),
        None,
        replace(CONFIG, epochs=1, batch_size=batch_size),
        regularizer=regularizer,
    )
    assert regularizer.calls == steps


def test_a_model_without_trainable_parameters_is_refused(train_images: TinyImages) -> None:
    model = tiny_network()
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match="no trainable parameter"):
        train(model, train_images, None, CONFIG)


def test_labels_beyond_the_outputs_are_named(train_images: TinyImages) -> None:
    model = tiny_network()
    model[9] = nn.Linear(5, 2)
    with pytest.raises(ModelError, match="2 outputs"):
        train(model, train_images, None, CONFIG)
    assert_as_it_came(model)


def test_convolutions_of_other_ranks_train() -> None:
    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(1, 4, 3, padding=1)
            self.line = nn.Conv1d(4, 4, 3, padding=1)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.line(self.conv(images[:, None]).flatten(2)).mean(dim=2))

    model = Volume()
    result = train(model, tiny_images(20), None, replace(CONFIG, epochs=1))
    assert math.isfinite(result.final.loss)
