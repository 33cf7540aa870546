"""The whole schedule on the digits: sparse training, plan, retraining; killed and resumed; and dense runs."""

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
from torch import nn

from dscore_plugin import load_pruned
from dscore_plugin.costs import count
from dscore_plugin.datasets import load_data
from dscore_plugin.errors import ArtifactError, BudgetError, ModelError, TrainingError
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.integrations.torch_pruning.links import scored_layers
from dscore_plugin.jobs import Source
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.plan import ChannelRemoval, InputRemoval, Plan
from dscore_plugin.sparse_training import paper_schedule, plan_sparsity
from dscore_plugin.train_jobs import TrainJob
from dscore_plugin.training import tracking
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.evaluation import evaluate
from dscore_plugin.training_runs import run_train

from .killed_training import job

IMAGE = torch.zeros(1, 3, 32, 32)


@pytest.fixture(autouse=True)
def no_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dscore_plugin.runs.latency", lambda *_: {"1": {"median": 1.0, "iqr": 0.0}})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run_train(job(out))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_the_schedule_ends_in_an_artifact(finished):
    out, metrics = finished
    assert {p.name for p in out.iterdir()} == {
        "history.json", "metrics.json", "model.safetensors", "pruned_structure.json", "report.md",
        "sparsity.json", "sparsity.png", "sparsity.svg",
    }  # fmt: skip
    assert not out.with_name("run.work").exists()
    picture = (out / "sparsity.svg").read_text()
    assert all(text in picture for text in ("lambda of the epoch", "target", "below 0.02"))
    model = load_pruned(out)
    assert evaluate(model, load_data("digits").test).top1 == metrics["finetuned"]["top1"] > 90
    assert count(model, (torch.zeros(1, 1, 8, 8),))[0] == metrics["pruned"]["macs"] < metrics["dense"]["macs"]
    trajectory = [row["regularizer"] for row in read(out / "sparsity.json")]
    assert [row["lambda"] for row in trajectory[:2]] == [0, 0.01]
    assert metrics["sparsity"]["reached"] == trajectory[-1]["sparsity"] > 0.1
    assert abs(metrics["sparsity"]["removed"] - 0.4) <= 0.5 / 176 or metrics["sparsity"]["removed"] < 0.4


def test_a_killed_run_goes_on_to_the_same_lambdas_plan_and_weights(finished, tmp_path: Path):
    out = tmp_path / "run"
    script = Path(__file__).with_name("killed_training.py")
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # they decide on the order of sums
    killed = subprocess.run(
        [sys.executable, script, out], capture_output=True, text=True, timeout=600, env=os.environ | threads
    )
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert read(out.with_name("run.work") / "sparse" / "state.json")["epoch"] == 2
    with pytest.raises(ArtifactError, match="unfinished run"):
        run_train(job(out))
    run_train(job(out, resume=True))
    expected, _ = finished
    for name in ("sparsity.json", "history.json"):
        assert without_seconds(read(out / name)) == without_seconds(read(expected / name))
    plans = [read(folder / "pruned_structure.json")["plan"] for folder in (out, expected)]
    assert plans[0] == plans[1]
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_a_dense_run_leaves_weights_and_history(tmp_path: Path):
    out = tmp_path / "dense"
    metrics = run_train(TrainJob(Source(device="cpu"), TrainingConfig(4, 0.05, precision="float32"), out))
    assert {p.name for p in out.iterdir()} == {"history.json", "metrics.json", "model.safetensors"}
    model = create_model("digits_cnn", num_classes=10, in_chans=1)
    load_weights(model, out / "model.safetensors")
    assert evaluate(model, load_data("digits").test).top1 == metrics["dense"]["top1"] > 80
    assert [row["epoch"] for row in read(out / "history.json")] == [1, 2, 3, 4]
    with pytest.raises(ArtifactError, match="exists"):
        run_train(TrainJob(Source(device="cpu"), TrainingConfig(1), out))


def test_without_matplotlib_the_artifact_has_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    whole, epoch = job(tmp_path / "run"), TrainingConfig(1, batch_size=256)
    run_train(replace(whole, training=epoch, sparsity=replace(whole.sparsity, training=epoch)))
    assert not list((tmp_path / "run").glob("sparsity.[ps]*g"))
    assert (tmp_path / "run" / "sparsity.json").exists()


def test_what_the_machine_cannot_do_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracking._AVAILABLE, "wandb", lambda: False)
    whole = job(tmp_path / "run")
    with pytest.raises(TrainingError, match="track='wandb' needs a package"):
        run_train(replace(whole, training=replace(whole.training, track="wandb")))
    with pytest.raises(ModelError, match="device 'foo' cannot be computed on"):
        run_train(replace(whole, source=Source(device="foo")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "dependency_awar"}, TrainingError, "did you mean 'dependency_aware'"),
        ({"target": 1.0}, BudgetError, "target must lie"),
        ({"min_channels": 0}, BudgetError, "min_channels >= 1"),
        ({"threshold": 0.0}, BudgetError, "threshold between"),
        ({"delta": 0.0}, TrainingError, "delta must be"),
    ],
)
def test_bad_goals_are_refused_before_any_work(tmp_path: Path, changes, error, message):
    whole = job(tmp_path / "run")
    with pytest.raises(error, match=message):
        run_train(replace(whole, sparsity=replace(whole.sparsity, **changes)))
    assert list(tmp_path.iterdir()) == []


def test_the_papers_schedule():
    sparse, retraining = paper_schedule()
    assert (sparse.epochs, sparse.learning_rate, sparse.schedule) == (160, 0.1, "constant")
    assert (sparse.momentum, sparse.weight_decay, sparse.batch_size) == (0.9, 1e-4, 64)
    assert (retraining.schedule, retraining.milestones, retraining.gamma) == ("steps", (80, 120), 0.1)
    assert paper_schedule(40, seed=3)[1].milestones == (20, 30)
    assert [config.epochs for config in paper_schedule(1)] == [1, 1]


def pre_activation(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = create_model("cifar_preresnet20")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.running_mean)
    return model.eval()


def test_one_threshold_prunes_inner_channels_and_block_inputs():
    model = pre_activation()
    plan, numbers = plan_sparsity(model, (IMAGE,), 0.5, min_channels=2)
    layers = {layer.name: layer.scores(model) for layer in scored_layers(PruningGraph(model, (IMAGE,)))}
    assert {r.type for r in plan.removals} == {ChannelRemoval.type, InputRemoval.type}
    assert all((r.type == "inputs") == r.layer.endswith("select") for r in plan.removals)
    for name, scores in layers.items():
        below = (scores <= numbers["threshold"] * scores.max()).nonzero().flatten().tolist()
        if len(below) <= len(scores) - 2:
            assert plan.removed(name) == tuple(below)
    gone = sum(len(r.channels) for r in plan.removals)
    assert gone / sum(map(len, layers.values())) == pytest.approx(numbers["removed"])
    assert numbers["removed"] == pytest.approx(0.5, abs=0.005)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_the_plans_costs_are_those_of_the_pruned_network():
    model = pre_activation()
    plan, _ = plan_sparsity(model, (IMAGE,), 0.6)
    assert plan.macs[0] == count(model, (IMAGE,))[0]
    plan.apply(model)
    macs, params = count(model, (IMAGE,))
    assert (plan.macs[1], plan.params[1]) == (macs, params)
    assert min(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)) >= 8


def test_targets_and_networks_that_cannot_be_planned_are_refused():
    with pytest.raises(BudgetError, match="target must lie"):
        plan_sparsity(pre_activation(), (IMAGE,), 0.0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    with pytest.raises(TrainingError, match="nothing in Sequential can be scored"):
        plan_sparsity(plain, (IMAGE,), 0.5)
