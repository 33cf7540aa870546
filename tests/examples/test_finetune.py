"""The fine-tuning scripts as a user runs them: alone, cut off and resumed, and in two processes."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from dscore_plugin import load_pruned
from dscore_plugin.artifact import read_structure
from dscore_plugin.models import create_model
from dscore_plugin.training import loop
from tests.image_files import make_folder, make_hub_folder, make_shards
from tests.training.test_tracking import read as read_curves

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Run = Callable[..., str | None]


class Crash(BaseException):
    """Stands for a process that ends in the middle of a line."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a script in an empty folder; gives its error message, if it ends with one."""
    monkeypatch.chdir(tmp_path)

    def run_script(name: str, *arguments: object) -> str | None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as stop:
            return str(stop.code)
        return None

    return run_script


@pytest.fixture
def crash_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """Give a context in which training ends after so many epochs were saved."""

    def patched(epochs: int) -> Any:
        save, patch = loop.save_checkpoint, pytest.MonkeyPatch()

        def save_and_count(folder: Path, checkpoint: Any) -> None:
            if len(checkpoint.history) > epochs:
                raise Crash
            save(folder, checkpoint)

        patch.setattr(loop, "save_checkpoint", save_and_count)
        return patch

    return patched


@pytest.fixture
def digits(tmp_path: Path) -> tuple[object, ...]:
    torch.manual_seed(0)
    weights = tmp_path / "digits.safetensors"
    save_file(create_model("digits_cnn", num_classes=10, in_chans=1).state_dict(), weights)
    common = ("--data", "digits", "--epochs", 2, "--batch-size", 64, "--precision", "float32")
    return ("cifar10_finetune.py", "--model", "digits_cnn", "--weights", weights, *common)


def small(tmp_path: Path, model: str = "test_resnet") -> tuple[object, ...]:
    torch.manual_seed(0)
    weights = tmp_path / f"{model}.safetensors"
    save_file(timm.create_model(model, num_classes=3).state_dict(), weights)
    common = (
        "--num-classes",
        3,
        "--image-size",
        32,
        "--epochs",
        2,
        "--batch-size",
        8,
        "--precision",
        "float32",
    )
    return ("imagenet_finetune.py", "--model", model, "--weights", weights, *common)


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].equal(other[name]), name


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_cifar10_from_a_dense_network_and_from_an_artifact(
    run: Run, digits: tuple[object, ...], tmp_path: Path
) -> None:
    everything = ("--mixup", 0.2, "--ema", 0.9, "--accumulate", 2, "--distill", 0.5, "--track", "tensorboard")
    assert run(*digits, *everything, "--target-macs", 0.4, "--learning-rate", 0.1, "--out", "a") is None
    metrics, history = (
        json.loads((tmp_path / "a" / f"{name}.json").read_text()) for name in ("metrics", "history")
    )
    assert metrics["pruned"]["macs"] <= 0.4 * metrics["dense"]["macs"]
    assert metrics["finetuned"]["top1"] > 15
    assert [row["epoch"] for row in history] == [1, 2]
    assert read_curves(tmp_path / "a.logs")["loss"].keys() == {1, 2}
    assert left(tmp_path) == {"a", "a.logs"}

    assert run(digits[0], *digits[5:], "--artifact", "a", "--out", "b") is None
    before, after = (read_structure(tmp_path / name) for name in "ab")
    assert {**before, "versions": None} == {**after, "versions": None}
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["dense"] == metrics["dense"]
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert load_pruned(tmp_path / "b")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_cifar10_resumes_with_the_same_bits(
    run: Run, digits: tuple[object, ...], tmp_path: Path, crash_after: Callable[[int], Any]
) -> None:
    options = ("--ema", 0.9, "--cutmix", 1.0, "--workers", 1)
    assert run(*digits, *options, "--out", "whole") is None
    patch = crash_after(1)
    with pytest.raises(Crash):
        run(*digits, *options, "--out", "cut")
    patch.undo()
    assert left(tmp_path) == {"whole", "cut.work"}
    message = run(*digits, *options, "--out", "cut")
    assert message is not None
    assert "--resume" in message
    message = run(*digits, *options, "--out", "cut", "--target-macs", 0.3, "--resume")
    assert message is not None
    assert "target_macs differ" in message
    message = run(*digits, *options, "--out", "cut", "--mixup", 0.1, "--resume")
    assert message is not None
    assert "mixup differs" in message
    assert run(*digits, *options, "--out", "cut", "--resume") is None
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert left(tmp_path) == {"whole", "cut"}
    message = run(*digits, *options, "--out", "cut")
    assert message is not None
    assert "exists already" in message


def test_imagenet_trains_two_epochs_on_a_folder_and_resumes(
    run: Run, tmp_path: Path, crash_after: Callable[[int], Any]
) -> None:
    script = (*small(tmp_path), "--data-dir", make_folder(tmp_path / "images"), "--auto-augment", "rand-m7")
    assert run(*script, "--out", "whole") is None
    metrics, history = (
        json.loads((tmp_path / "whole" / f"{name}.json").read_text()) for name in ("metrics", "history")
    )
    assert len(history) == 2
    assert metrics["finetuned"]["top1"] == history[-1]["validation_top1"]
    assert metrics["pruned"]["macs"] <= 0.5 * metrics["dense"]["macs"]
    patch = crash_after(1)
    with pytest.raises(Crash):
        run(*script, "--out", "cut")
    patch.undo()
    assert run(*script, "--out", "cut", "--resume") is None
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("kind", ["wds", "hfds", "hfids"])
def test_imagenet_reads_shards_and_the_hubs_layout_and_resumes(
    run: Run, tmp_path: Path, crash_after: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "wds":
        splits = ("--train-split", "train-{0..3}.tar|24", "--val-split", "val-{0..3}.tar|24")
        data = ("--dataset", "wds/tiny", "--data-dir", make_shards(tmp_path / "shards"), *splits)
    else:
        hub = make_hub_folder(tmp_path / "hub")
        monkeypatch.setattr(
            "datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0
        )  # 5 s for each unfinished pass
        data = ("--dataset", f"{kind}/{hub}", "--data-dir", tmp_path / "cache")
        data += ("--train-samples", 24, "--val-samples", 24) if kind == "hfids" else ()
    script = (*small(tmp_path), *data, "--ema", 0.5, "--mixup", 0.2)
    assert run(*script, "--out", "whole") is None
    patch = crash_after(1)
    with pytest.raises(Crash):
        run(*script, "--out", "cut")
    patch.undo()
    if kind != "hfds":  # the order of a stream depends on who reads it
        message = run(*script, "--out", "cut", "--resume", "--workers", 1)
        assert message is not None
        assert "reading of the stream differs" in message
    assert run(*script, "--out", "cut", "--resume") is None
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_what_is_missing_is_named(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("imagenet_finetune.py", "--epochs", 1, "--out", "a") == "2"
    assert "give --model, or --artifact" in capsys.readouterr().err
    message = run(*small(tmp_path), "--data-dir", tmp_path / "nowhere", "--out", "a")
    assert message is not None
    assert message.startswith("error: data set ''")


def test_two_processes_give_what_one_gives(run: Run, tmp_path: Path) -> None:
    """With a network without batch norm, whose statistics would be those of the shares."""
    images = make_folder(tmp_path / "images")
    script = (*small(tmp_path, "test_convnext"), "--layers", "inner", "--data-dir", images)
    script += ("--mixup", 0.2, "--cutmix", 1.0, "--ema", 0.8, "--label-smoothing", 0.1)
    assert run(*script, "--out", "one") is None
    name, *arguments = map(str, script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(EXAMPLES / name), *arguments, "--accumulate", "2", "--out", "two"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("top-1") == 1
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key in one:
        assert torch.allclose(two[key], one[key], rtol=1e-3, atol=1e-5), key
    rows = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two")]
    for first, second in zip(*rows, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
        assert second["validation_top1"] == first["validation_top1"]
