from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dscore_plugin.errors import TrainingError
from dscore_plugin.training import checkpoint as room
from dscore_plugin.training.checkpoint import (
    Checkpoint,
    check_resumable,
    describe_parameters,
    load_checkpoint,
    save_checkpoint,
)
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.history import EpochRecord
from tests.training.conftest import assert_same_bits, tiny_network

RECORD = EpochRecord(1, 0.1 + 0.2, 50.0, None, 0.02, 1.5, {"sparsity": 1 / 3})


def example(model: nn.Module | None = None, **changes: Any) -> Checkpoint:
    model = model or tiny_network()
    return replace(
        Checkpoint(
            weights=model.state_dict(),
            momentum={name: torch.randn(p.shape) for name, p in model.named_parameters()},
            config=TrainingConfig(epochs=3, precision="float32", milestones=(1, 2), schedule="steps"),
            fingerprint=describe_parameters(model),
            images=50,
            history=(RECORD,),
            regularizer={"factor": 0.1},
        ),
        **changes,
    )


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    saved = example()
    save_checkpoint(tmp_path / "deep" / "run", saved)
    loaded = load_checkpoint(tmp_path / "deep" / "run")
    assert loaded is not None
    assert_same_bits(loaded.weights, saved.weights)
    assert_same_bits(loaded.momentum, saved.momentum)
    assert replace(loaded, weights={}, momentum={}) == replace(saved, weights={}, momentum={})
    assert files(tmp_path / "deep") == {"run"}
    assert files(tmp_path / "deep" / "run") == {"weights.safetensors", "optimizer.safetensors", "state.json"}


def test_an_average_comes_back_and_is_guarded(tmp_path: Path) -> None:
    config = TrainingConfig(epochs=3, ema=0.9, precision="float32")
    saved = example(config=config, ema=tiny_network(seed=3).state_dict())
    save_checkpoint(tmp_path / "run", saved)
    loaded = load_checkpoint(tmp_path / "run")
    assert loaded is not None
    assert loaded.ema is not None
    assert saved.ema is not None
    assert_same_bits(loaded.ema, saved.ema)
    flip_a_byte(tmp_path / "run" / "ema.safetensors")
    with pytest.raises(TrainingError, match="is corrupt"):
        load_checkpoint(tmp_path / "run")


def test_a_checkpoint_from_before_the_later_options_is_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "run", example())
    path = tmp_path / "run" / "state.json"
    state = json.loads(path.read_text())
    del state["stream"]
    for name in ("accumulate", "ema", "mixup", "cutmix", "track"):
        del state["config"][name]
    path.write_text(json.dumps(state))
    loaded = load_checkpoint(tmp_path / "run")
    assert loaded is not None
    check_resumable(loaded, example().config, tiny_network(), 50, regularized=True)


def test_other_readers_of_a_stream_are_named() -> None:
    saved = example(stream={"processes": 2, "workers": 1})
    check_resumable(saved, saved.config, tiny_network(), 50, True, {"processes": 2, "workers": 1})
    for now in ({"processes": 1, "workers": 1}, None):
        with pytest.raises(TrainingError, match="reading of the stream differs"):
            check_resumable(saved, saved.config, tiny_network(), 50, True, now)


def test_the_weights_load_into_the_model_as_they_are(tmp_path: Path) -> None:
    model = tiny_network(seed=1)
    save_checkpoint(tmp_path / "run", example(model))
    other = tiny_network(seed=2)
    other.load_state_dict(load_file(tmp_path / "run" / "weights.safetensors"), strict=True)
    assert_same_bits(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_weights_in_any_layout_and_tied_ones_are_saved(
    tmp_path: Path, memory_format: torch.memory_format
) -> None:
    model = tiny_network().to(memory_format=memory_format)
    model.add_module("again", model[0])
    save_checkpoint(tmp_path / "run", example(model))
    loaded = load_checkpoint(tmp_path / "run")
    assert loaded is not None
    assert_same_bits(loaded.weights, model.state_dict())


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "run") is None
    (tmp_path / "run").mkdir()
    assert load_checkpoint(tmp_path / "run") is None


def test_a_folder_or_file_of_someone_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(TrainingError, match="is no checkpoint"):
        load_checkpoint(tmp_path / "thesis")
    with pytest.raises(TrainingError, match="is a file"):
        load_checkpoint(tmp_path / "thesis" / "chapter.tex")


class Crash(BaseException):
    """Stands for a process that ends in the middle of a line."""


def operations(monkeypatch: pytest.MonkeyPatch, on: Callable[[int, str], None]) -> None:
    """Call ``on(number, name)`` before every operation on the disk."""
    counter = iter(range(1000))

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            on(next(counter), name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in [
        (room, "save_file"),
        (room, "_digest"),
        (room, "_sync"),
        (Path, "write_text"),
        (Path, "rename"),
        (shutil, "rmtree"),
    ]:
        watch(owner, name)


def count_operations(folder: Path) -> int:
    counted: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        save_checkpoint(folder, example())
        operations(patch, lambda number, name: counted.append(name))
        save_checkpoint(folder, example())
    assert counted.count("rename") == 2
    return len(counted)


@pytest.mark.parametrize("power_cut", [True, False])
def test_a_crash_at_any_moment_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, power_cut: bool
) -> None:
    total = count_operations(tmp_path / "count")
    old, new = example(images=1), example(images=2)
    found = []
    for moment in range(total):
        folder = tmp_path / f"run{moment}"
        save_checkpoint(folder, old)
        with monkeypatch.context() as patch:
            if power_cut:  # nothing of the clean-up runs either
                patch.setattr(room, "_undo", lambda *paths: None)

            def crash(number: int, name: str, moment: int = moment) -> None:
                if number == moment:
                    raise Crash

            operations(patch, crash)
            with pytest.raises(Crash):
                save_checkpoint(folder, new)
        if not power_cut:
            assert folder.exists()
            assert not (tmp_path / f".run{moment}.partial").exists()
        loaded = load_checkpoint(folder)
        assert loaded is not None
        assert_same_bits(loaded.weights, (old if loaded.images == 1 else new).weights)
        found.append(loaded.images)
        save_checkpoint(folder, new)  # the left-overs do not stand in the way
        assert not list(tmp_path.glob(f".run{moment}.*"))
    assert found == sorted(found)
    assert set(found) == {1, 2}


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors"])
def test_damage_is_noticed(tmp_path: Path, damage: Callable[[Path], None], name: str) -> None:
    save_checkpoint(tmp_path / "run", example())
    damage(tmp_path / "run" / name)
    with pytest.raises(TrainingError, match="is corrupt") as caught:
        load_checkpoint(tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("history"),
        lambda state: state.update(epoch=2),
        lambda state: state["config"].update(epochs=0),
        lambda state: state["config"].update(surprise=1),
        lambda state: state["history"][0].pop("loss"),
        lambda state: state.update(history=None),
        lambda state: state.update(sha256={}),
    ],
)
def test_a_state_that_makes_no_sense_is_corrupt(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    save_checkpoint(tmp_path / "run", example())
    path = tmp_path / "run" / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    with pytest.raises(TrainingError, match="is corrupt"):
        load_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3"])
def test_a_state_that_is_no_object_is_corrupt(tmp_path: Path, text: str) -> None:
    save_checkpoint(tmp_path / "run", example())
    (tmp_path / "run" / "state.json").write_text(text)
    with pytest.raises(TrainingError, match="is corrupt"):
        load_checkpoint(tmp_path / "run")


def test_another_format_version_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "run", example())
    path = tmp_path / "run" / "state.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(TrainingError, match="format version 99"):
        load_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("state", [{"a": float("nan")}, {"a": torch.ones(2)}])
def test_a_regularizer_state_that_is_not_plain_is_refused(tmp_path: Path, state: Any) -> None:
    save_checkpoint(tmp_path / "run", example(images=1))
    with pytest.raises(TrainingError, match="regularizer's state"):
        save_checkpoint(tmp_path / "run", example(images=2, regularizer=state))
    loaded = load_checkpoint(tmp_path / "run")
    assert loaded is not None
    assert loaded.images == 1


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="cannot write checkpoint"):
        save_checkpoint(tmp_path / "file" / "run", example())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.03),
        ("momentum", 0.8),
        ("nesterov", True),
        ("weight_decay", 0.0),
        ("milestones", (1,)),
        ("gamma", 0.2),
        ("warmup_epochs", 1),
        ("label_smoothing", 0.1),
        ("batch_size", 64),
        ("accumulate", 2),
        ("mixup", 0.2),
        ("cutmix", 0.2),
        ("ema", 0.9),
        ("precision", "bfloat16"),
        ("seed", 1),
        ("epochs", 2),
    ],
)
def test_a_changed_configuration_is_named(name: str, value: Any) -> None:
    saved, model = example(), tiny_network()
    changed = replace(saved.config, **{name: value})
    with pytest.raises(TrainingError, match=f"{name} differs"):
        check_resumable(saved, changed, model, 50, regularized=True)


def test_what_has_no_effect_on_the_weights_may_change() -> None:
    saved = example()
    changed = replace(saved.config, workers=2, validate_every=3, track="tensorboard")
    check_resumable(saved, changed, tiny_network(), 50, regularized=True)


def test_epochs_may_be_raised_where_the_past_does_not_depend_on_them() -> None:
    for schedule, milestones in (("steps", (1, 2)), ("constant", ()), ("cosine", ())):
        config = TrainingConfig(epochs=3, precision="float32", schedule=schedule, milestones=milestones)  # type: ignore[arg-type]
        saved = example(config=config)
        longer = replace(config, epochs=9)
        if schedule == "cosine":
            with pytest.raises(TrainingError, match="epochs differs"):
                check_resumable(saved, longer, tiny_network(), 50, regularized=True)
        else:
            check_resumable(saved, longer, tiny_network(), 50, regularized=True)


def test_another_model_is_named_by_its_first_parameter_that_differs() -> None:
    saved = example()
    wider = tiny_network()
    wider[9] = nn.Linear(5, 7)
    frozen = tiny_network()
    frozen[0].weight.requires_grad = False
    deeper = tiny_network()
    deeper.add_module("more", nn.Linear(3, 3))
    shallower = tiny_network()
    del shallower[9]
    models = {"9.weight": wider, "0.weight": frozen, "more.weight": deeper}
    for name, model in {**models, "9.weight ": shallower}.items():
        with pytest.raises(TrainingError, match=f"parameter '{name.strip()}' differs"):
            check_resumable(saved, saved.config, model, 50, regularized=True)


def test_another_set_or_a_missing_regularizer_is_named() -> None:
    saved = example()
    with pytest.raises(TrainingError, match=r"number of training images differs \(checkpoint: 50, now: 51\)"):
        check_resumable(saved, saved.config, tiny_network(), 51, regularized=True)
    with pytest.raises(TrainingError, match="use of a regularizer differs"):
        check_resumable(saved, saved.config, tiny_network(), 50, regularized=False)
