"""The whole schedule on the digits: train with strengths, remove kernels, retrain, load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dscore_plugin import load_pruned
from dscore_plugin.errors import BudgetError
from dscore_plugin.jobs import Source
from dscore_plugin.report.kernel_numbers import kernel_numbers
from dscore_plugin.surgery.kernels import kernel_masks
from dscore_plugin.synaptic_training import plan_strengths, run_synaptic
from dscore_plugin.train_jobs import TrainJob
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.synaptic import (
    SynapticGoal,
    from_synaptic,
    strengths,
    synaptic_schedule,
    to_synaptic,
)
from tests.training.test_synaptic import two_layers


def test_digits_lose_kernels_and_stay_recognised(tmp_path: Path) -> None:
    sparse, retraining = synaptic_schedule(2, 2, batch_size=64)
    goal = SynapticGoal(0.6, sparse, strength=1e-3, sweep=(0.3, 0.9))
    job = TrainJob(Source(device="cpu"), retraining, tmp_path / "out", goal)
    said: list[str] = []
    metrics = run_synaptic(job, say=said.append)
    assert metrics["finetuned"]["top1"] > 60
    assert metrics["sweep"].keys() == {"0.6", "0.3", "0.9"}
    assert metrics["sweep"]["0.3"] > metrics["sweep"]["0.9"]
    model = load_pruned(job.out)
    masks = kernel_masks(model)
    kernels = sum(mask.numel() for mask in masks.values())
    assert 1 - sum(int(mask.sum()) for mask in masks.values()) / kernels == pytest.approx(0.6, abs=0.001)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight.flatten(2).ne(0).any(dim=2), mask)
    numbers = kernel_numbers(model, torch.zeros(1, 1, 8, 8), job.out)
    for key in ("macs", "params", "kernels"):
        assert metrics["kernels"][key] == numbers[key]
    assert numbers["bytes"]["stored"] < 0.6 * numbers["bytes"]["physical"]
    history = json.loads((job.out / "sparsity.json").read_text())
    assert len(history) == 2
    assert not job.work.exists()


def test_the_trained_strengths_decide_also_on_channels_that_are_constant() -> None:
    """Behind a scale of 0 the constant f(beta) passes through the kernels: it counts for what it was trained to."""
    model = two_layers()
    model.body[1].weight.data[2] = 0
    example = (torch.zeros(1, 3, 12, 12),)
    to_synaptic(model, example)
    trained = {name: strength.detach().abs() for name, strength in strengths(model).items()}
    plan, *_ = plan_strengths(from_synaptic(model), example, trained, SynapticGoal(0.25, TrainingConfig(1)))
    (removal,) = plan.removals
    assert set(removal.indices) == set(trained["body.3"].flatten().argsort()[:5].tolist())


def test_a_goal_out_of_range_is_refused_before_any_work(tmp_path: Path) -> None:
    sparse, retraining = synaptic_schedule(1, 1)
    job = TrainJob(Source(), retraining, tmp_path / "out", SynapticGoal(1.5, sparse))
    with pytest.raises(BudgetError, match="ratio"):
        run_synaptic(job)
    assert not list(tmp_path.iterdir())
