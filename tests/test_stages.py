"""Runs of several stages: rounds that approach a goal, and what an interrupted run leaves for its continuation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dscore_plugin import load_pruned, pipeline
from dscore_plugin.errors import BudgetError, CriterionError
from dscore_plugin.jobs import Choice, PruneJob, Source, amount_in_round
from dscore_plugin.models import create_model
from dscore_plugin.training.config import TrainingConfig

EPOCH = TrainingConfig(epochs=1, batch_size=256)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    save_file(create_model("digits_cnn", num_classes=10, in_chans=1).state_dict(), path)
    return str(path)


def job(weights: str, out: Path, **changes: Any) -> PruneJob:
    settings: dict[str, Any] = {"choices": (Choice(target_macs=0.5),), "rounds": 2, "recalibrate": False}
    settings |= {"training": EPOCH, "round_training": EPOCH, **changes}
    return PruneJob(Source(weights=weights), out=out, **settings)


@pytest.mark.parametrize(
    ("goal", "amount", "left", "things", "expected"),
    [
        ("target_macs", 0.25, 1.0, 0, [0.5, 0.5]),
        ("target_params", 0.25, 1.0, 0, [0.5, 0.5]),
        ("target_latency", 0.25, 1.0, 0, [0.5, 0.5]),
        ("ratio", 0.75, 1.0, 0, [0.5, 0.5]),
        ("keep_layers", 4, 1.0, 9, [6, 4]),
    ],
)
def test_two_rounds_reach_the_goal(
    goal: str, amount: float, left: float, things: int, expected: list[float]
) -> None:
    first = amount_in_round(goal, amount, 1, 2, left, things)
    second = amount_in_round(goal, amount, 2, 2, first, int(first))
    assert [first, second] == pytest.approx(expected)


def test_a_round_makes_up_for_what_the_one_before_removed_too_much() -> None:
    assert amount_in_round("target_macs", 0.25, 2, 2, left=0.4, things=0) == pytest.approx(0.25 / 0.4)


def test_rounds_approach_the_goal_and_are_recorded(weights: str, tmp_path: Path) -> None:
    metrics = pipeline.run_prune(job(weights, tmp_path / "a"))

    macs = [stage["pruned"]["macs"] / metrics["dense"]["macs"] for stage in metrics["stages"]]
    assert 0.6 < macs[0] <= 0.5**0.5
    assert 0.4 < macs[1] <= 0.5
    assert metrics["finetuned"] == metrics["stages"][1]["finetuned"]
    structure = json.loads((tmp_path / "a" / "pruned_structure.json").read_text())
    assert [len(plan["removals"]) > 0 for plan in structure["plan"]["stages"]] == [True, True]
    report = (tmp_path / "a" / "report.md").read_text()
    assert report.count("features.0") >= 2
    assert load_pruned(tmp_path / "a")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_an_interrupted_run_goes_on_with_the_next_stage(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.run_prune(job(weights, tmp_path / "whole"))
    run_stage, ran = pipeline._Run.stage, []

    def interrupted(run: Any, number: int, model: Any) -> dict[str, Any]:
        ran.append(number)
        if ran == [1, 2]:
            raise KeyboardInterrupt
        return run_stage(run, number, model)

    monkeypatch.setattr(pipeline._Run, "stage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run_prune(job(weights, tmp_path / "a"))
    assert not (tmp_path / "a").exists()
    pipeline.run_prune(job(weights, tmp_path / "a", resume=True))

    assert ran == [1, 2, 2]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "a"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("choice", "rounds", "error", "message"),
    [
        (Choice(max_drop=2, allocation="sensitivity"), 2, BudgetError, "rounds"),
        (Choice("dcp_adapt"), 2, BudgetError, "rounds"),
        (Choice("dcp"), 1, BudgetError, "exactly one"),
        (Choice(ratio=0.5, granularity="layer"), 1, CriterionError, "prunes channels"),
        (Choice(keep_layers=3), 1, BudgetError, "keep_layers"),
        (Choice(ratio=0.5, keep_layers=3), 1, BudgetError, "exactly one"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    weights: str, tmp_path: Path, choice: Choice, rounds: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pipeline.run_prune(job(weights, tmp_path / "a", choices=(choice,), rounds=rounds))
    assert not any(tmp_path.iterdir())


def test_ratios_of_their_own_make_stages_and_exclude_a_goal() -> None:
    assert [(c.unit, c.ratio) for c in Choice().in_stages({"channel": 0.5, "kernel": 0.6})] == [
        ("channel", 0.5), ("kernel", 0.6),
    ]  # fmt: skip
    assert Choice(ratio=0.3).in_stages({"channel": None, "kernel": None}) == (Choice(ratio=0.3),)
    with pytest.raises(BudgetError, match="leave no room"):
        Choice(ratio=0.3).in_stages({"kernel": 0.5})


def test_the_dense_network_teaches_every_stage(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught, train = [], pipeline.train

    def note(model: Any, *rest: Any, teacher: Any = None, **options: Any) -> Any:
        taught.append(teacher.state_dict() if teacher else None)
        return train(model, *rest, teacher=teacher, **options)

    monkeypatch.setattr(pipeline, "train", note)
    epoch = TrainingConfig(epochs=1, batch_size=256, distill=0.5)
    pipeline.run_prune(job(weights, tmp_path / "a", training=epoch, round_training=epoch))
    dense = load_file(weights)
    assert len(taught) == 2
    assert all(torch.equal(state[key], dense[key]) for state in taught for key in dense)
