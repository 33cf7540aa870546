"""NNI's experiment on the digits: started, run to its end, stopped; a trial alone."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nni")
pytest.importorskip("sklearn")

import psutil

from dscore_plugin.datasets import load_data
from dscore_plugin.errors import BudgetError
from dscore_plugin.integrations.nni.experiment import __main__ as experiment
from dscore_plugin.integrations.nni.experiment import trial
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.surgery.kernel_masks import kernel_masks

MODULE = "dscore_plugin.integrations.nni.experiment"


@pytest.mark.parametrize(
    ("criterion", "allocation"), [("d_score", "uniform"), ("d_step", "global"), ("taylor", "uniform")]
)
def test_a_trial_removes_what_it_is_asked_to(criterion: str, allocation: str) -> None:
    data = load_data("digits")
    torch.manual_seed(0)
    model = create_model("digits_cnn")
    inputs = (torch.zeros(1, *data.input_shape),)
    chosen = {"criterion": criterion, "allocation": allocation, "ratio": 0.5}
    trial.prune(model, inputs, chosen, data)
    widths = [module.out_channels for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    if allocation == "uniform":
        assert widths == [8, 16, 32, 32]
    else:
        assert 0 < sum(widths) < 16 + 32 + 64 + 64
    assert model(torch.zeros(2, *data.input_shape)).shape == (2, 10)


def test_a_trial_can_take_single_kernels() -> None:
    data = load_data("digits")
    torch.manual_seed(0)
    model = create_model("digits_cnn")
    chosen = {"criterion": "synaptic_strength", "allocation": "uniform", "ratio": 0.5}
    trial.prune(model, (torch.zeros(1, *data.input_shape),), chosen, data)
    left = [float(mask.float().mean()) for mask in kernel_masks(model).values()]
    assert left[-2:] == [0.5, 0.5]


def test_an_unknown_allocation_is_refused() -> None:
    with pytest.raises(BudgetError, match="allocation 'fair' is unknown; expected one of uniform, global"):
        trial.run({"allocation": "fair"}, trial.parser(None).parse_args([]))


def test_the_dense_network_is_trained_once_for_each_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr(experiment, "load_data", lambda spec, seed: asked.append(spec))
    monkeypatch.setattr(trial, "dense_network", lambda *_: torch.nn.Linear(2, 2))

    def train(data: str) -> Path:
        return experiment.train_once(experiment.parser().parse_args(["--data", data]), tmp_path)

    first = train("cifar10:one")
    assert train(f"cifar10:{tmp_path / 'one'}") == first
    assert train("cifar10:two") != first
    assert asked == ["cifar10:one", "cifar10:two"]
    load_weights(torch.nn.Linear(2, 2), first)

    def interrupted(state: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"half of the weigh")
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("cifar10:three")
    assert sorted(tmp_path.iterdir()) == before
    load_weights(torch.nn.Linear(2, 2), train("cifar10:three"))


def test_trials_find_data_from_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = experiment.parser().parse_args(["--data", "cifar10:one", "--weights", "w.safetensors"])
    command = experiment.make_config(arguments, tmp_path).trial_command
    assert f"--data=cifar10:{tmp_path / 'one'}" in shlex.split(command)


def test_an_experiment_of_four_trials_runs_and_ends_what_it_started(tmp_path: Path) -> None:
    out, home = tmp_path / "experiment", tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "-m", MODULE, "--trials", "4", "--concurrency", "2", "--epochs", "1"]
    command += ["--dense-epochs", "2", "--out", str(out)]
    environment = {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "output.txt"
    with log.open("w") as output:
        runner = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        code = runner.wait(timeout=900)
    except BaseException:  # too slow a machine, or an impatient user
        for process in [*psutil.Process(runner.pid).children(recursive=True), runner]:
            process.kill()
        raise
    said = log.read_text()
    assert code == 0, said[-3000:]
    results = json.loads((out / "results.json").read_text())
    assert len(results) == 4
    objectives = [one["result"]["default"] for one in results]
    assert objectives == sorted(objectives, reverse=True)
    for one in results:
        assert set(one["parameters"]) == {"criterion", "allocation", "ratio"}
        assert 0 < one["result"]["macs_kept"] < 1
        assert 0 <= one["result"]["top1"] <= 100
    port = int(re.search(r"web page: http://127.0.0.1:(\d+)", said).group(1))  # type: ignore[union-attr]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    left = [
        process.info["cmdline"]
        for process in psutil.process_iter(["cmdline"])
        if any(str(tmp_path) in word for word in process.info["cmdline"] or ())
    ]
    assert not left
