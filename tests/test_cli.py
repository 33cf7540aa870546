"""The command line as a user meets it: what it prints, what it refuses, what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dscore_plugin import Plan, load_pruned, save_pruned
from dscore_plugin.cli import main
from dscore_plugin.models import create_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dscore(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run ``dscore ...`` in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dscore", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of an untrained digits CNN."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    save_file(create_model("digits_cnn", num_classes=10, in_chans=1).state_dict(), path)
    return path


def test_prune_without_arguments(dscore: Run, tmp_path: Path) -> None:
    code, out, err = dscore("prune", "--json", "--dense-epochs", 4, "--epochs", 2)

    assert code == 0, err
    metrics = json.loads(out)
    folder = tmp_path / metrics["folder"]
    assert json.loads((folder / "metrics.json").read_text()) == {
        k: v for k, v in metrics.items() if k != "folder"
    }
    assert metrics["dense"]["top1"] > 85
    assert metrics["finetuned"]["top1"] > metrics["pruned"]["top1"]
    assert metrics["recalibrated"]["statistics_of"] == "augmented"  # it was trained here
    assert 0.4 <= metrics["pruned"]["macs"] / metrics["dense"]["macs"] <= 0.5
    for stage in ("dense", "pruned", "recalibrated", "finetuned"):
        known = {
            "top1",
            "macs",
            "params",
            "latency_ms",
            *(["statistics_of"] if stage == "recalibrated" else []),
        }
        assert set(metrics[stage]) == known
        assert set(metrics[stage]["latency_ms"]) == {"1", "64"}
        assert set(metrics[stage]["latency_ms"]["1"]) == {"median", "iqr"}
    assert not (tmp_path / f"{metrics['folder']}.work").exists()
    assert {file.name for file in folder.iterdir()} == {
        "model.safetensors", "pruned_structure.json", "metrics.json", "report.md",
    }  # fmt: skip

    code, out, _ = dscore("evaluate", folder, "--json")
    again = json.loads(out)
    assert code == 0
    assert again["top1"] == metrics["finetuned"]["top1"]
    assert again["images"] == 359
    assert (again["macs"], again["params"]) == (metrics["pruned"]["macs"], metrics["pruned"]["params"])
    assert set(again) == {"top1", "images", "macs", "params", "latency_ms"}


def test_epochs_0_saves_the_recalibrated_network(dscore: Run, weights: Path, tmp_path: Path) -> None:
    common = ("prune", "--weights", weights, "--epochs", 0, "--ratio", 0.5, "--json")
    code, out, _ = dscore(*common, "--out", "a")
    metrics = json.loads(out)
    assert code == 0
    assert metrics["finetuned"] is None
    assert json.loads(dscore("evaluate", "a", "--json")[1])["top1"] == metrics["recalibrated"]["top1"]

    code, out, _ = dscore(*common, "--out", "b", "--no-recalibrate")
    metrics = json.loads(out)
    assert code == 0
    assert metrics["recalibrated"] is None
    assert metrics["finetuned"] is None
    dense = load_file(weights)["features.1.running_mean"]
    assert set(load_pruned(tmp_path / "b").features[1].running_mean.tolist()) <= set(dense.tolist())


def test_plan_is_written_and_applied(dscore: Run, weights: Path, tmp_path: Path) -> None:
    code, out, _ = dscore("plan", "--weights", weights, "--ratio", 0.25, "--out", "plan.json", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "plan.json").read_text())
    edited = Plan.load("plan.json").with_removed("features.0", [0, 5])
    edited.save("edited.json")

    replace(edited, made_by={"criterion": "coarse"}).save("edited.json")
    code, out, err = dscore("prune", "--weights", weights, "--plan", "edited.json", "--epochs", 0)
    assert code == 0, err
    assert "digits_cnn, coarse" in out
    assert load_pruned(tmp_path / "runs" / "digits_cnn-coarse").features[0].out_channels == 14

    code, _, err = dscore("plan", "--weights", weights, "--ratio", 0.25, "--out", "plan.json")
    assert code == 2
    assert "exists already" in err


def test_plan_of_other_weights_is_refused(dscore: Run, weights: Path, tmp_path: Path) -> None:
    dscore("plan", "--weights", weights, "--ratio", 0.25, "--out", "plan.json")
    state = load_file(weights)
    state["features.0.weight"] += 1
    save_file(state, "other.safetensors")
    code, _, err = dscore(
        "prune", "--weights", "other.safetensors", "--plan", "plan.json", "--epochs", 0, "--out", "p"
    )
    assert code == 2
    assert "fingerprints differ" in err
    assert not (tmp_path / "p").exists()


def test_list(dscore: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.loads(dscore("list", "--json")[1])["criteria"]
    assert {"d_score", "d_step", "d_step_gm", "l1", "fpgm", "random"} <= {row["name"] for row in rows}
    assert next(row for row in rows if row["name"] == "d_score")["arxiv"] == "2308.04470"
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = dscore("list")
    assert code == 0
    assert all(row["name"] in out and row["arxiv"] in out for row in rows)
    assert "gradients" in out


def test_train_makes_weights_that_prune_takes(dscore: Run, tmp_path: Path) -> None:
    code, out, err = dscore("train", "--epochs", 2, "--out", "dense", "--json")
    assert code == 0, err
    top1 = json.loads(out)["dense"]["top1"]
    file = tmp_path / "dense" / "model.safetensors"
    code, out, err = dscore("evaluate", "--model", "digits_cnn", "--weights", file, "--json")
    assert code == 0, err
    assert json.loads(out)["top1"] == top1
    code, _, err = dscore("evaluate", "dense")
    assert code == 2
    assert (
        "dense holds a dense network; measure it with --model NAME --weights dense/model.safetensors" in err
    )


def test_train_towards_sparsity(dscore: Run, tmp_path: Path) -> None:
    code, out, err = dscore(
        "train", "--sparsity", "dependency_aware", "--target", 0.3, "--epochs", 2, "--out", "s", "--json"
    )
    assert code == 0, err
    metrics = json.loads(out)
    assert metrics["pruned"]["macs"] < metrics["dense"]["macs"]
    assert load_pruned(tmp_path / "s") is not None
    code, out, err = dscore(
        "train", "--sparsity", "synaptic_strength", "--lambda", 1e-5, "--ratio", 0.6, "--sweep", "0.3,0.8",
        "--epochs", 2, "--retrain-epochs", 1, "--out", "k", "--json",
    )  # fmt: skip
    assert code == 0, err
    metrics = json.loads(out)
    assert metrics["kernels"]["kernels"]["sparsity"] > 0.5
    assert set(metrics["sweep"]) == {"0.6", "0.3", "0.8"}
    found = json.loads(dscore("evaluate", "k", "--json")[1])
    assert found["top1"] == metrics["finetuned"]["top1"]
    assert {batch: set(entry) for batch, entry in found["sparse_latency_ms"].items()} == dict.fromkeys(
        ("1", "64"), {"dense", "sparse", "backends"}
    )
    code, _, err = dscore("train", "--sparsity", "dependency", "--out", "t")
    assert code == 2
    assert "did you mean 'dependency_aware'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--sparsity", "dependency_aware", "--ratio", 0.8],
            "--ratio would be ignored: it belongs to --sparsity syn",
        ),
        (["--sparsity", "synaptic_strength", "--target", 0.5], "--target would be ignored"),
        (["--lambda", 1e-5, "--sweep", "0.3"], "--lambda, --sweep would be ignored"),
        (["--retrain-epochs", 2], "--retrain-epochs would be ignored: it belongs to --sparsity"),
    ],
)
def test_train_refuses_options_of_another_method(
    dscore: Run, tmp_path: Path, arguments: list[object], message: str
) -> None:
    code, _, err = dscore("train", *arguments, "--out", "t")
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_evaluated_on_images_of_its_shape(dscore: Run, tmp_path: Path) -> None:
    arguments = {"num_classes": 10}
    save_pruned(
        create_model("cifar_resnet20", **arguments), tmp_path / "a", architecture="cifar_resnet20",
        model_args=arguments, input_shape=(3, 32, 32),
    )  # fmt: skip
    code, _, err = dscore("evaluate", "a")
    assert code == 2
    assert "was made for images of 3 x 32 x 32, those of 'digits' are 1 x 8 x 8" in err


@pytest.mark.parametrize("command", ["prune", "evaluate", "plan", "list", "sensitivity", "train"])
def test_help_shows_an_example(dscore: Run, command: str) -> None:
    code, out, _ = dscore(command, "--help")
    assert code == 0
    assert f"dscore {command}" in out
    assert "--json" in out
    assert "--seed" in out


def test_a_dense_network_is_evaluated(dscore: Run, weights: Path) -> None:
    code, out, _ = dscore("evaluate", "--model", "digits_cnn", "--weights", weights, "--json")
    assert code == 0
    assert 0 <= json.loads(out)["top1"] <= 100


BAD_INPUT: list[tuple[str, list[object], str]] = [
    ("unknown model", ["--model", "digit_cnn"], "did you mean 'digits_cnn'"),
    ("unknown criterion", ["--criterion", "dscor"], "did you mean 'd_score'"),
    ("missing weights", ["--weights", "nowhere.safetensors"], "nowhere.safetensors"),
    ("corrupt weights", ["--weights", "corrupt.safetensors"], "corrupt.safetensors"),
    ("weights of another architecture", ["--weights", "other.safetensors"], "other.safetensors"),
    ("NaN in weights", ["--weights", "nan.safetensors"], "NaN"),
    ("ratio 0", ["--ratio", 0], "between 0 and 1"),
    ("ratio 1", ["--ratio", 1], "between 0 and 1"),
    ("ratio above 1", ["--ratio", 1.5], "between 0 and 1"),
    ("target MACs above 1", ["--target-macs", 2], "between 0 and 1"),
    ("two goals", ["--ratio", 0.5, "--target-macs", 0.5], "exactly one"),
    ("unreachable MACs", ["--target-macs", 0.001], "the nearest is"),
    ("existing output", ["--out", "there"], "--force"),
    ("unknown data", ["--data", "digit"], "did you mean"),
    ("data in no known layout", ["--data", "cifar10:there"], "there"),
    ("missing data", ["--data", "cifar10:nowhere"], "nowhere"),
    ("unknown allocation", ["--allocation", "unifrom"], "uniform"),
    ("missing plan", ["--plan", "nowhere.json"], "nowhere.json"),
    ("no weights and no dense training", ["--model", "cifar_resnet20", "--dense-epochs", 0], "--weights"),
    ("bad model argument", ["--model-arg", "x"], "NAME=VALUE"),
    ("unknown device", ["--device", "foo"], "device 'foo' cannot be computed on"),
    ("table without its allocation", ["--sensitivity", "s.json", "--ratio", 0.5], "makes no use of a sensitivity"),
    ("ratio and criterion beside a plan", ["--plan", "p.json", "--ratio", 0.9, "--criterion", "l1"],
     "--criterion, --ratio would be ignored: the plan says"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"), [case[1:] for case in BAD_INPUT], ids=[c[0] for c in BAD_INPUT]
)
def test_bad_input_is_one_line_and_exit_code_2(
    dscore: Run, weights: Path, tmp_path: Path, arguments: list[object], message: str
) -> None:
    state = load_file(weights)
    (tmp_path / "corrupt.safetensors").write_bytes(weights.read_bytes()[:1000])
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    save_file(
        {**state, "features.0.weight": state["features.0.weight"] * float("nan")},
        tmp_path / "nan.safetensors",
    )
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    given = (
        ["--weights", weights] if "--weights" not in arguments and "--dense-epochs" not in arguments else []
    )

    code, out, err = dscore("prune", "--epochs", 0, *given, *arguments)

    assert code == 2, err
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("dscore: ")
    assert message in last
    assert (tmp_path / "there" / "precious").read_text() == "kept"
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert not [path for path in left if path.name == "model.safetensors"]


def test_force_replaces(dscore: Run, weights: Path, tmp_path: Path) -> None:
    common = ("prune", "--weights", weights, "--epochs", 0, "--out", "a", "--json")
    assert dscore(*common, "--ratio", 0.5)[0] == 0
    assert dscore(*common, "--ratio", 0.25)[0] == 2
    assert dscore(*common, "--ratio", 0.25, "--force")[0] == 0
    assert load_pruned(tmp_path / "a").features[0].out_channels == 12


@pytest.mark.parametrize("damage", ["truncate", "version", "shape", "missing"])
def test_a_damaged_artifact_is_refused(dscore: Run, weights: Path, tmp_path: Path, damage: str) -> None:
    dscore("prune", "--weights", weights, "--epochs", 0, "--out", "a", "--ratio", 0.5)
    folder = tmp_path / "a"
    tensors, structure = folder / "model.safetensors", folder / "pruned_structure.json"
    content: dict[str, Any] = json.loads(structure.read_text())
    if damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "version":
        structure.write_text(json.dumps({**content, "format_version": 99}))
    elif damage == "missing":
        state = load_file(tensors)
        state.pop("features.0.weight")
        save_file(state, tensors)
    else:
        state = load_file(tensors)
        state["features.0.weight"] = torch.zeros(3, 1, 3, 3)
        save_file(state, tensors)
    code, _, err = dscore("evaluate", folder)
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("dscore: ")


def test_ctrl_c_leaves_no_half_artifact_and_resume_goes_on(weights: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "dscore_plugin.cli", "prune", "--weights", str(weights), "--epochs", "8",
        "--ratio", "0.25", "--batch-size", "32", "--out", "a", "--json",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits deafness
    )  # fmt: skip
    checkpoint = tmp_path / "a.work" / "finetune" / "state.json"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume" in err
    assert not (tmp_path / "a").exists()
    assert checkpoint.exists()

    refused = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "unfinished run" in refused.stderr

    resumed = subprocess.run(
        [*command, "--resume"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    whole = subprocess.run(
        [*command[:-3], "--out", "b"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert whole.returncode == 0, whole.stderr
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(one[key], other[key]) for key in one)
