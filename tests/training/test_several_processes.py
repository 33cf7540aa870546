"""One launch with three processes on the CPU; the tests read what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dscore_plugin.training import train
from dscore_plugin.training.checkpoint import load_checkpoint
from tests.training.conftest import HalfGradient, assert_same_bits, tiny_images, tiny_network
from tests.training.several_processes import CONFIGS, regularizer_for
from tests.training.test_tracking import read

PROCESSES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("launched")
    # Not `accelerate launch --cpu`: without mpirun it starts one process, whatever --num_processes says.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = Path(__file__).with_name("several_processes.py")
    done = subprocess.run(
        [*launch, "--nproc_per_node", str(PROCESSES), str(script), str(out)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def findings(folder: Path) -> list[dict[str, Any]]:
    read = [json.loads((folder / f"findings_{i}.json").read_text()) for i in range(PROCESSES)]
    assert [found["processes"] for found in read] == [PROCESSES] * PROCESSES
    return read


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("name", [*CONFIGS, "norm", "averaged_norm"])
def test_all_processes_end_with_the_same(folder: Path, findings: list[dict[str, Any]], name: str) -> None:
    states = [load_file(folder / f"{name}_{i}.safetensors") for i in range(PROCESSES)]
    for i in range(1, PROCESSES):
        assert_same_bits(states[i], states[0])
        assert without_times(findings[i][name]) == without_times(findings[0][name])


@pytest.mark.parametrize("name", list(CONFIGS))
def test_several_processes_train_as_one_does(folder: Path, findings: list[dict[str, Any]], name: str) -> None:
    model = tiny_network(norm=False)
    images, validation = tiny_images(50, augmented=True), tiny_images(31, seed=1)
    alone = replace(CONFIGS[name], accumulate=1, track=None)
    result = train(model, images, validation, alone, regularizer=regularizer_for(alone))
    together = load_file(folder / f"{name}_0.safetensors")
    for key, tensor in model.state_dict().items():
        assert torch.allclose(together[key], tensor, rtol=1e-4, atol=1e-6), key
    for one, several in zip(result.rows(), findings[0][name], strict=True):
        assert several["loss"] == pytest.approx(one["loss"], rel=1e-5)
        for key in ("epoch", "train_top1", "validation_top1", "learning_rate", "regularizer"):
            assert several[key] == one[key]
    assert findings[0][name][-1]["validation_top1"] == findings[0][f"{name}_evaluated"]


def test_the_main_process_alone_writes_the_curves(folder: Path, findings: list[dict[str, Any]]) -> None:
    assert len(list((folder / "run_averaged.logs").glob("events.*"))) == 1
    curve = read(folder / "run_averaged.logs")["loss"]
    assert curve == {row["epoch"]: pytest.approx(row["loss"]) for row in findings[0]["averaged"]}


def test_batch_norm_trains_although_shares_are_small(findings: list[dict[str, Any]]) -> None:
    assert findings[0]["norm"][-1]["train_top1"] > 80


def test_a_checkpoint_of_several_processes_goes_on_in_one(folder: Path) -> None:
    saved = load_checkpoint(folder / "run_uneven")
    assert saved is not None
    assert len(saved.history) == 3
    model = tiny_network(norm=False, seed=9)
    train(
        model,
        tiny_images(50, augmented=True),
        tiny_images(31, seed=1),
        replace(CONFIGS["uneven"]),
        checkpoint=folder / "run_uneven",
        resume=True,
        regularizer=HalfGradient(),
    )
    assert_same_bits(model.state_dict(), load_file(folder / "uneven_0.safetensors"))


def test_all_processes_stop_when_the_loss_is_not_finite(findings: list[dict[str, Any]]) -> None:
    assert {found["error"] for found in findings} == {findings[0]["error"]}
    assert "the loss is nan at epoch 1, step 2 of 4" in findings[0]["error"]
