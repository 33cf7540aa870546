"""Runs of several stages: rounds that approach a goal, and what an interrupted run leaves for its continuation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dscore_plugin import load_pruned, pipeline, planning, runs
from dscore_plugin.errors import ArtifactError, BudgetError, CriterionError, DScoreError
from dscore_plugin.jobs import Analysis, Choice, PruneJob, Source, amount_in_round
from dscore_plugin.models import create_model
from dscore_plugin.surgery.kernel_masks import kernel_masks
from dscore_plugin.training import precision, tracking
from dscore_plugin.training.config import TrainingConfig

EPOCH = TrainingConfig(epochs=1, batch_size=256)
TAUGHT = replace(EPOCH, distill=0.5)
KERNELS = Choice("synaptic_strength", granularity="kernel", ratio=0.5, criterion_options={"foo": 1})


@pytest.fixture(autouse=True)
def no_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the measurement out, which takes seconds."""
    monkeypatch.setattr(runs, "latency", lambda model, shape: {"1": {"median": 1.0, "iqr": 0.0}})


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
        ("cumulative_ratio", 0.75, 1.0, 0, [0.5, 0.75]),
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


@pytest.mark.parametrize(
    "choice",
    [Choice("synaptic_strength", "kernel"), Choice("coarse", "kernel", criterion_options={"candidates": 2})],
    ids=lambda choice: choice.criterion,
)
def test_rounds_of_kernels_remove_the_whole_share(weights: str, tmp_path: Path, choice: Choice) -> None:
    settings = {"choices": (replace(choice, ratio=0.75),), "training": None, "round_training": None}
    pipeline.run_prune(job(weights, tmp_path / "a", **settings))
    masks = kernel_masks(load_pruned(tmp_path / "a")).values()
    assert sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks) == pytest.approx(0.25, abs=0.01)


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


@pytest.mark.parametrize(
    ("last", "earlier", "expected"),
    [(TAUGHT, TAUGHT, [True, True]), (None, TAUGHT, [True]), (TAUGHT, EPOCH, [False, True])],
)
def test_the_dense_network_teaches_every_stage_that_distils(
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    last: TrainingConfig | None,
    earlier: TrainingConfig,
    expected: list[bool],
) -> None:
    taught, train = [], pipeline.train

    def note(model: Any, *rest: Any, teacher: Any = None, **options: Any) -> Any:
        taught.append(teacher.state_dict() if teacher else None)
        return train(model, *rest, teacher=teacher, **options)

    monkeypatch.setattr(pipeline, "train", note)
    pipeline.run_prune(job(weights, tmp_path / "a", training=last, round_training=earlier))
    dense = load_file(weights)
    assert [state is not None for state in taught] == expected
    assert all(torch.equal(state[key], dense[key]) for state in taught if state for key in dense)


class Interruption(BaseException):
    """Stands for a process that ends in the middle of a line."""


def interrupted(monkeypatch: pytest.MonkeyPatch, method: str, run: PruneJob) -> None:
    """Run a job, and stop it where it would do something for the first time."""

    def stop(*_: Any) -> None:
        raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(pipeline._Run, method, stop)
        with pytest.raises(Interruption):
            pipeline.run_prune(run)


def test_a_continued_run_takes_the_plan_that_measured_latencies_made(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([0.5, 0.6])
    choose = pipeline.choose
    noisy = lambda source, choice, *rest, **options: choose(  # noqa: E731
        source, replace(choice, target_latency=None, ratio=next(measured)), *rest, **options
    )
    monkeypatch.setattr(pipeline, "choose", noisy)
    run = job(weights, tmp_path / "a", choices=(Choice(target_latency=0.5),), rounds=1)
    interrupted(monkeypatch, "_finetuned", run)
    pipeline.run_prune(replace(run, resume=True))
    assert load_pruned(tmp_path / "a").features[0].out_channels == 8


def test_a_search_that_changes_weights_is_continued_with_the_latencies_measured_before(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([0.7, 0.71])  # of the first allocation that is tried, half of the channels
    monkeypatch.setattr(planning._Search, "_latency", lambda search, counts: next(measured))
    options = {"selection_images": 32, "channels_per_step": 32, "head_epochs": 0}
    choice = Choice("dcp", target_latency=0.7, criterion_options=options)
    run = job(weights, tmp_path / "a", choices=(choice,), rounds=1, training=None)
    interrupted(monkeypatch, "save", run)
    pipeline.run_prune(replace(run, resume=True))
    assert next(measured) == 0.71


def test_what_changes_no_weight_may_change_before_a_run_goes_on(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = job(weights, tmp_path / "a", rounds=1)
    interrupted(monkeypatch, "stage", run)
    other = replace(run, training=replace(EPOCH, validate_every=2), resume=True)
    note = run.work / "job.json"
    before = json.loads(note.read_text())
    before["training"] |= {"workers": 0, "validate_every": 1, "track": None}  # as earlier releases wrote it
    note.write_text(json.dumps(before))
    with pytest.raises(ArtifactError, match="training differ"):
        pipeline.run_prune(replace(other, training=replace(EPOCH, learning_rate=0.3)))
    pipeline.run_prune(other)
    assert (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": (Choice(ratio=0.5, layers="iner"),)}, "layers 'iner' is unknown"),
        ({"choices": (Choice(ratio=0.5, criterion_options={"foo": 1}),)}, "cannot take the options"),
        ({"choices": (KERNELS,)}, "takes no options where it prunes kernels"),
        ({"choices": (Choice("l1", ratio=0.5, analysis=Analysis(rerank=True)),)}, "leave --rerank out"),
        ({"choices": (Choice(ratio=0.5, analysis=Analysis(paper_protocol=True)),)}, "no use of paper_proto"),
        ({"round_training": replace(EPOCH, track="wandb")}, "track='wandb' needs a package"),
        ({"training": replace(EPOCH, precision="bfloat16")}, "precision='bfloat16' needs"),
        ({"source": Source(device="foo", weights="x")}, "device 'foo' cannot be computed on"),
        ({"source": Source(device="meta", weights="x")}, "device 'meta' cannot be computed on"),
    ],
)
def test_what_a_machine_or_a_criterion_cannot_do_is_refused_before_any_work(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    monkeypatch.setitem(tracking._AVAILABLE, "wandb", lambda: False)
    run = replace(job(weights, tmp_path / "a", rounds=1), **changes)
    with pytest.raises(DScoreError, match=message):
        pipeline.run_prune(run)
    assert not any(tmp_path.iterdir())
