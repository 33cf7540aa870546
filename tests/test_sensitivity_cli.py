"""Sensitivity analysis, thresholds and budgets from the command line and from Python."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dscore_plugin import plan_pruning
from dscore_plugin.cli import main
from dscore_plugin.datasets import load_data
from dscore_plugin.errors import BudgetError, DataError, PlanError
from dscore_plugin.files import read_json
from dscore_plugin.groups import removal_count
from dscore_plugin.jobs import Choice, PruneJob, Source
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.pipeline import run_prune
from dscore_plugin.selection.sensitivity import Sensitivity
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.loop import train

Run = Callable[..., tuple[int, str, str]]
X = torch.zeros(1, 1, 8, 8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits CNN, trained for a few epochs."""
    data = load_data("digits")
    torch.manual_seed(0)
    model = create_model("digits_cnn", num_classes=10, in_chans=1)
    train(model, data.train, None, TrainingConfig(epochs=4, learning_rate=0.1, precision="float32"))
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture
def model(weights: Path) -> torch.nn.Module:
    built = create_model("digits_cnn", num_classes=10, in_chans=1)
    load_weights(built, weights)
    return built.eval()


@pytest.fixture
def dscore(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dscore", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.fixture
def table(dscore: Run, weights: Path) -> Path:
    code, _, err = dscore("sensitivity", "--weights", weights, "--images", 120, "--out", "s")
    assert code == 0, err
    return Path("s/sensitivity.json").absolute()


def test_the_analysis_writes_a_table_and_its_picture(table: Path) -> None:
    content = json.loads(table.read_text())
    assert content["images"] == 120
    assert content["protocol"] == "validation"
    assert set(content["layers"]) == {"features.0", "features.3", "features.7", "features.10"}
    cells = content["layers"]["features.0"]
    assert list(cells) == [f"{step / 20:.2f}" for step in range(1, 20)]
    assert all(0 <= top1 <= 100 for top1 in cells.values())
    assert cells["0.05"] == content["dense_top1"]  # floor(0.05 * 16) removes nothing
    assert {file.name for file in table.parent.iterdir()} == {
        "sensitivity.json", "sensitivity.csv", "sensitivity.png", "sensitivity.svg",
    }  # fmt: skip
    assert not table.parent.with_name("s.work").exists()


def test_an_interrupted_analysis_goes_on_with_the_same_options_only(
    dscore: Run, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = ("sensitivity", "--weights", weights, "--images", 60, "--out", "s")
    with monkeypatch.context() as patch:
        patch.setattr(Sensitivity, "save", lambda *_: (_ for _ in ()).throw(DataError("no room")))
        assert dscore(*every)[0] == 2
    measured = Path("s.work/cells.jsonl").read_text()
    assert "--resume" in dscore(*every)[2]
    assert "s.work holds another run (choice differ)" in dscore(*every, "--criterion", "l1", "--resume")[2]
    assert Path("s.work/cells.jsonl").read_text() == measured

    shutil.copytree("s.work", "later.work")
    code, _, err = dscore(*every[:-1], "later", "--resume")
    assert code == 0, err
    assert "continuing the run in later.work" in err
    assert not Path("later.work").exists()

    shutil.copytree("s.work", "other.work")
    other = (*every[:-1], "other", "--criterion", "l1")
    assert "start over with --force" in dscore(*other, "--resume")[2]
    assert dscore(*other, "--resume", "--force")[0] == 0

    Path("s.work/job.json").unlink()
    assert "s.work does not say which run it holds" in dscore(*every, "--resume")[2]
    assert dscore(*every, "--force")[0] == 0
    Path("empty.work").mkdir()
    assert dscore(*every[:-1], "empty")[0] == 0  # killed before it did anything


def test_the_plan_applies_what_was_measured(dscore: Run, weights: Path, table: Path) -> None:
    code, out, err = dscore(
        "plan", "--weights", weights, "--allocation", "sensitivity", "--sensitivity", table, "--max-drop", 5,
        "--out", "plan.json", "--json",
    )  # fmt: skip
    assert code == 0, err
    measured = Sensitivity.load(table)
    for layer, ratio in measured.ratios_at(measured.dense_top1 - 5).items():
        order = measured.orders[layer]
        expected = sorted(order[: removal_count(ratio, len(order))])
        removed = [r["channels"] for r in json.loads(out)["removals"] if r["layer"] == layer]
        assert (removed[0] if removed else []) == expected


@pytest.mark.parametrize("goal", [{"target_macs": 0.5}, {"target_params": 0.6}, {"ratio": 0.4}])
def test_budgets_are_met_by_sensitivity(model: torch.nn.Module, table: Path, goal: dict[str, float]) -> None:
    plan = plan_pruning(model, X, allocation="sensitivity", sensitivity=Sensitivity.load(table), **goal)
    ((name, amount),) = goal.items()
    if name == "ratio":
        units = sum(row.channels for row in plan.rows)
        assert sum(len(r.channels) for r in plan.removals) / units == pytest.approx(amount, abs=2 / units)
    else:
        before, after = plan.macs if name == "target_macs" else plan.params
        assert amount - 0.03 <= after / before <= amount  # the small CNN's channels are coarse


def test_measured_latency_is_met_or_said_to_be_out_of_reach(model: torch.nn.Module) -> None:
    try:
        plan = plan_pruning(model, X, target_latency=0.7, latency_batch=64)
    except BudgetError as error:
        assert "nearest" in str(error)  # noqa: PT017
    else:
        assert plan.macs[1] < plan.macs[0]
        assert plan.made_by["latency_batch"] == 64


def test_rerank_orders_step_by_step(model: torch.nn.Module) -> None:
    steps = [step / 20 for step in range(1, 20)]
    once = plan_pruning(model, X, ratio=0.6)
    stepwise = plan_pruning(model, X, ratio=0.6, rerank=steps)
    assert [len(r.channels) for r in once.removals] == [len(r.channels) for r in stepwise.removals]
    assert once.difference(stepwise)


def test_prune_measures_the_table_itself(weights: Path, tmp_path: Path) -> None:
    choice = Choice(target_macs=0.5, allocation="sensitivity")
    job = PruneJob(Source(weights=str(weights)), (choice,), tmp_path / "out", recalibrate=False)
    metrics = run_prune(job)
    assert 0.45 <= metrics["pruned"]["macs"] / metrics["dense"]["macs"] <= 0.5
    plan = read_json(tmp_path / "out" / "pruned_structure.json")["plan"]
    assert plan["made_by"]["allocation"] == "sensitivity"
    assert plan["made_by"]["sensitivity"]["protocol"] == "validation"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--allocation", "sensitivity", "--threshold", 99.99], "dense accuracy"),
        (["--allocation", "uniform", "--threshold", 90], "needs the allocation 'sensitivity'"),
        (["--allocation", "sensitivity", "--threshold", 101], "between 0 and 100"),
        (["--allocation", "sensitivity", "--target-macs", 0.05, "--min-channels", 14], "the nearest is"),
        (["--ratio", 0.5], "makes no use of a sensitivity table"),
        (["--allocation", "global", "--early-exit", 5, "--ratio", 0.5], "a sensitivity table, early_exit"),
        (["--ratios", "0.1,x", "--ratio", 0.5], "no list of numbers"),
        (["--ratios", "0.1,1.5", "--ratio", 0.5], "between 0 and 1"),
    ],
)
def test_bad_input(dscore: Run, weights: Path, table: Path, arguments: list[object], message: str) -> None:
    code, _, err = dscore(
        "plan", "--weights", weights, "--sensitivity", table, *arguments, "--out", "bad.json", "--json"
    )
    assert code == 2
    assert message in err
    assert not Path("bad.json").exists()


def test_a_table_of_another_model_is_refused(table: Path) -> None:
    torch.manual_seed(1)
    other = create_model("digits_cnn", num_classes=10, in_chans=1).eval()
    with pytest.raises(PlanError, match="another model or other weights"):
        plan_pruning(other, X, target_macs=0.5, allocation="sensitivity", sensitivity=Sensitivity.load(table))


def test_the_paper_protocol_says_so_and_leaves_a_trace(dscore: Run, weights: Path) -> None:
    common = ("--weights", weights, "--images", 60, "--ratios", "0.5", "--json")
    code, out, err = dscore("sensitivity", *common, "--paper-protocol", "--out", "p")
    assert code == 0
    assert json.loads(out)["protocol"] == "test"
    assert "TEST" in err

    by_table = ("--allocation", "sensitivity", "--ratio", 0.2)
    measured = ("--sensitivity", "p/sensitivity.json")
    for options in (("--paper-protocol",), measured):
        code, out, err = dscore("plan", *common, *by_table, *options, "--force", "--out", "plan.json")
        assert code == 0, err
        assert "TEST" in err
        assert json.loads(out)["made_by"]["sensitivity"] == {"images": 60, "protocol": "test"}
    code, _, err = dscore("prune", *common, *by_table, *measured, "--epochs", 0, "--out", "a")
    assert code == 0, err
    assert "TEST" in err
    assert "measured on 60 test images" in Path("a/report.md").read_text()


def test_without_matplotlib_the_table_is_written(
    dscore: Run, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = dscore(
        "sensitivity", "--weights", weights, "--images", 20, "--ratios", "0.5", "--out", "s"
    )
    assert code == 0, err
    assert {file.name for file in Path("s").iterdir()} == {"sensitivity.json", "sensitivity.csv"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "iner"], "layers 'iner' is unknown"),
        (["--criterion-option", "foo=1"], "cannot take the options"),
        (["--criterion", "energy"], "scores no channels"),
        (["--criterion", "l1", "--rerank"], "leave --rerank out"),
    ],
)
def test_a_criterion_that_cannot_be_analysed_is_refused_before_any_work(
    dscore: Run, weights: Path, arguments: list[object], message: str
) -> None:
    code, _, err = dscore("sensitivity", "--weights", weights, *arguments, "--out", "s")
    assert code == 2
    assert message in err
    assert not Path("s.work").exists()


def test_an_existing_folder_is_not_replaced(dscore: Run, weights: Path, table: Path) -> None:
    before = table.read_text()
    code, _, err = dscore("sensitivity", "--weights", weights, "--images", 60, "--out", table.parent)
    assert code == 2
    assert "--force" in err
    assert table.read_text() == before
