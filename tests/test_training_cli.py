"""The training options that ``dscore prune`` and ``dscore train`` share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dscore_plugin import pipeline, runs, train_jobs
from dscore_plugin.cli import main
from dscore_plugin.errors import DataError
from dscore_plugin.models import create_model
from dscore_plugin.training.config import TrainingConfig
from tests.training.test_tracking import read as read_curves

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def dscore(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run ``dscore ...`` in an empty folder: exit code, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(
        runs, "latency", lambda model, shape: {"1": {"median": 1.0, "iqr": 0.0}}
    )  # takes long

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["dscore", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture
def prune(tmp_path: Path) -> tuple[object, ...]:
    torch.manual_seed(0)
    weights = tmp_path / "digits.safetensors"
    save_file(create_model("digits_cnn", num_classes=10, in_chans=1).state_dict(), weights)
    return ("prune", "--weights", weights, "--epochs", 2, "--precision", "float32", "--json")


OPTIONS = {"--ema": 0.9, "--mixup": 0.2, "--cutmix": 1.0, "--accumulate": 2}


def test_the_options_reach_the_training(
    dscore: Run, prune: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen, train = [], pipeline.train
    monkeypatch.setattr(
        pipeline, "train", lambda *args, **kwargs: seen.append(args[3]) or train(*args, **kwargs)
    )
    assert dscore(*prune, "--out", "plain")[0] == 0
    code, err = dscore(*prune, *(text for pair in OPTIONS.items() for text in pair), "--out", "other")
    assert code == 0, err
    plain, other = seen
    assert other == replace(plain, **{option[2:]: value for option, value in OPTIONS.items()})
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "other")]
    assert not all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_the_dense_network_is_trained_with_the_options_whether_or_not_fine_tuning_follows(
    dscore: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def note(*arguments: object, **options: object) -> None:
        seen.append(arguments[3])
        raise DataError("no more")

    monkeypatch.setattr(pipeline, "train", note)
    options = {
        "--seed": 5,
        "--batch-size": 32,
        "--precision": "float32",
        "--weight-decay": 0.001,
        "--mixup": 0.1,
    }
    common = ("prune", *(text for pair in options.items() for text in pair), "--force", "--out", "a")
    for epochs in (0, 3):
        assert "no more" in dscore(*common, "--epochs", epochs, "--distill", 0.5)[1]
    expected = {option[2:].replace("-", "_"): value for option, value in options.items()}
    assert seen == [TrainingConfig(epochs=20, learning_rate=0.1, **expected)] * 2


def test_curves_stay_beside_the_artifact(dscore: Run, prune: tuple[object, ...], tmp_path: Path) -> None:
    assert dscore(*prune, "--track", "tensorboard", "--rounds", 2, "--out", "a")[0] == 0
    for stage in ("stage-1", "stage-2"):
        assert read_curves(tmp_path / "a.logs" / stage / "finetune")["loss"].keys() == {1, 2}
    assert not (tmp_path / "a.work").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ema", 1), "ema=1.0 is not valid"),
        (("--mixup", -1), "mixup=-1.0 is not valid"),
        (("--track", "tensorbord"), "did you mean 'tensorboard'"),
        (("--cutmix", 1, "--batch-size", 33), "batch_size=33 is odd"),
        (("--schedule", "steps", "--milestones", "1.7"), "no list of whole numbers"),
        (("--round-epochs", 1), "--round-epochs would be ignored"),
    ],
)
def test_bad_values_are_named_before_any_work(
    dscore: Run, prune: tuple[object, ...], tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    code, err = dscore(*prune, *options, "--out", "a")
    assert code == 2
    assert message in err
    assert not (tmp_path / "a.work").exists()


def test_a_resumed_run_keeps_its_options(
    dscore: Run, prune: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "train", lambda *arguments, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            dscore(*prune, "--ema", 0.9, "--out", "a")
    code, err = dscore(*prune, "--ema", 0.8, "--out", "a", "--resume")
    assert code == 2
    assert "training" in err
    assert dscore(*prune, "--ema", 0.9, "--out", "a", "--resume")[0] == 0


def test_dscore_train_takes_them_and_averages_no_weights_under_a_penalty(
    dscore: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    common = ("train", "--model", "digits_cnn", "--epochs", 2, "--precision", "float32", "--json")
    every = [text for pair in OPTIONS.items() for text in pair] + ["--track", "tensorboard"]
    assert dscore(*common, *every, "--out", "dense")[0] == 0
    assert read_curves(tmp_path / "dense.logs" / "dense")["loss"].keys() == {1, 2}
    assert len(json.loads((tmp_path / "dense" / "history.json").read_text())) == 2

    seen = []
    train = train_jobs.train
    monkeypatch.setattr(
        train_jobs, "train", lambda *args, **kwargs: seen.append(args[3]) or train(*args, **kwargs)
    )
    sparse = ("--sparsity", "dependency_aware", "--retrain-epochs", 1, "--delta", 0.01)
    assert dscore(*common, *every, *sparse, "--out", "sparse")[0] == 0
    assert [(config.ema, config.mixup) for config in seen] == [(0.0, 0.2), (0.9, 0.2)]


def test_launched_processes_train_together_and_prune_not_at_all(
    prune: tuple[object, ...], tmp_path: Path
) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]

    def launched(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*launch, "dscore_plugin.cli", *map(str, arguments), "--data", "digits"],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
            cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    training = ("train", "--model", "digits_cnn", "--epochs", 1, "--out", "dense")
    trained = launched(*training)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / "dense").iterdir()) == [
        "history.json", "metrics.json", "model.safetensors",
    ]  # fmt: skip
    assert not (tmp_path / "dense.work").exists()

    (tmp_path / "other.work").mkdir()
    (tmp_path / "other.work" / "job.json").write_text("{}")
    refused = launched(*training[:-1], "other")
    assert refused.returncode != 0
    assert refused.stderr.count("holds an unfinished run; go on with --resume") == 2  # each process says so
    refused = launched(*prune, "--out", "pruned")
    assert refused.returncode != 0
    assert "dscore prune runs in one process" in refused.stderr
    assert not list(tmp_path.glob("pruned*"))
