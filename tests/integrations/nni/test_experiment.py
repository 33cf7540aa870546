"""NNI's experiment on the digits: started, run to its end, stopped; a trial alone."""

from __future__ import annotations

import json
import os
import re
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
from dscore_plugin.integrations.nni.experiment import trial
from dscore_plugin.models import create_model

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


def test_an_unknown_allocation_is_refused() -> None:
    with pytest.raises(BudgetError, match="allocation 'fair' is unknown; expected one of uniform, global"):
        trial.run({"allocation": "fair"}, trial.parser(None).parse_args([]))


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
