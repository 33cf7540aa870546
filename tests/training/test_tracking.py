from __future__ import annotations

import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import LoggerType

from dscore_plugin.errors import TrainingError
from dscore_plugin.training import tracking
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.history import EpochRecord
from dscore_plugin.training.loop import train
from tests.training.conftest import HalfGradient, TinyImages, assert_same_bits, snapshot, tiny_network

CONFIG = TrainingConfig(
    epochs=3, batch_size=16, precision="float32", track="tensorboard", schedule="constant"
)


def read(folder: Path) -> dict[str, dict[int, float]]:
    """Read a TensorBoard folder: for each curve the value at each step, which it has once."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = events.EventAccumulator(str(folder))
    reader.Reload()
    curves = {}
    for name in reader.Tags()["scalars"]:
        points = [(event.step, event.value) for event in reader.Scalars(name)]
        curves[name] = dict(points)
        assert len(curves[name]) == len(points), name
    return curves


def test_tensorboard_shows_the_history(
    train_images: TinyImages, validation_images: TinyImages, tmp_path: Path
) -> None:
    model, plain = tiny_network(), tiny_network()
    result = train(
        model, train_images, validation_images, CONFIG,
        checkpoint=tmp_path / "run", regularizer=HalfGradient(),
    )  # fmt: skip
    curves = read(tmp_path / "run.logs")
    for name in ("loss", "train_top1", "validation_top1", "learning_rate"):
        expected = {record.epoch: pytest.approx(getattr(record, name)) for record in result.history}
        assert curves[name] == expected
    assert curves["regularizer/factor"] == {1: 0.25, 2: 0.125, 3: 0.0625}
    train(plain, train_images, None, replace(CONFIG, track=None), regularizer=HalfGradient())
    assert_same_bits(model.state_dict(), snapshot(plain))


def test_a_resumed_run_goes_on_in_its_curves_and_replaces_what_was_cut_off(
    train_images: TinyImages, tmp_path: Path
) -> None:
    def next_second() -> None:
        time.sleep(1)  # TensorBoard reads its files in the order of their names, which tell the second

    folder, short = tmp_path / "run", replace(CONFIG, epochs=2)
    first = train(tiny_network(), train_images, None, short, checkpoint=folder, logs=tmp_path / "logs")
    next_second()
    with pytest.MonkeyPatch.context() as patch:  # as if an epoch had been logged and its checkpoint lost
        patch.setattr("dscore_plugin.training.loop.save_checkpoint", lambda *arguments: None)
        longer = replace(CONFIG, epochs=4)
        train(
            tiny_network(), train_images, None, longer, checkpoint=folder, resume=True, logs=tmp_path / "logs"
        )
    next_second()
    result = train(
        tiny_network(), train_images, None, longer, checkpoint=folder, resume=True, logs=tmp_path / "logs"
    )
    seconds = read(tmp_path / "logs")["seconds"]
    assert seconds == {record.epoch: pytest.approx(record.seconds) for record in result.history}
    assert [seconds[epoch] for epoch in (1, 2)] == pytest.approx([r.seconds for r in first.history])


def test_wandb_gets_the_history_and_the_same_run_when_resumed(
    train_images: TinyImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a package in place of wandb that writes down how it is called: the real one needs an account."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Run:
        def log(self, values: dict[str, float], step: int, **options: Any) -> None:
            calls.append(("log", {**values, "step": step}))

        def finish(self) -> None:
            calls.append(("finish", {}))

    package: Any = types.ModuleType("wandb")
    package.init = lambda **options: calls.append(("init", options)) or Run()
    package.config = types.SimpleNamespace(update=lambda values, **options: calls.append(("config", values)))
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setitem(tracking._AVAILABLE, "wandb", lambda: True)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    config = replace(CONFIG, epochs=1, track="wandb")
    train(tiny_network(), train_images, None, config, checkpoint=tmp_path / "run")
    train(
        tiny_network(),
        train_images,
        None,
        replace(config, epochs=2),
        checkpoint=tmp_path / "run",
        resume=True,
    )
    assert [name for name, _ in calls] == ["init", "config", "log", "finish", "init", "log", "finish"]
    first, again = calls[0][1], calls[4][1]
    assert first == again
    assert first["project"] == "dscore-plugin"
    assert (first["dir"], first["name"], first["resume"]) == (str(tmp_path / "run.logs"), "run.logs", "allow")
    assert calls[1][1]["learning_rate"] == CONFIG.learning_rate
    assert [calls[2][1]["step"], calls[5][1]["step"]] == [1, 2]


def test_nothing_is_written_where_nothing_is_tracked(train_images: TinyImages, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1, track=None)
    train(tiny_network(), train_images, None, config, checkpoint=tmp_path / "run", logs=tmp_path / "logs")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_tracker_needs_a_folder(train_images: TinyImages) -> None:
    with pytest.raises(TrainingError, match=r"needs a folder; pass logs=FOLDER or checkpoint=FOLDER"):
        train(tiny_network(), train_images, None, CONFIG)


@pytest.mark.parametrize(
    ("name", "install"), [("tensorboard", r"dscore-plugin\[track\]"), ("wandb", "wandb")]
)
def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, install: str
) -> None:
    monkeypatch.setitem(tracking._AVAILABLE, name, lambda: False)
    with pytest.raises(TrainingError, match=f"track='{name}' needs .* pip install '?{install}"):
        tracking.log_folder(replace(CONFIG, track=name), tmp_path, None)  # type: ignore[arg-type]


def test_numbers_that_are_not_there_are_left_out() -> None:
    record = EpochRecord(2, 0.5, 50.0, None, 0.1, 1.0, {"sparsity": 0.25})
    assert tracking._numbers(record) == {
        "loss": 0.5, "train_top1": 50.0, "learning_rate": 0.1, "seconds": 1.0, "regularizer/sparsity": 0.25,
    }  # fmt: skip
