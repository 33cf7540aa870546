"""Search with NNI for the criterion, the allocation and the ratio; ends everything it starts.

The web page, on the port that is printed, shows the trials while they run. ``--config FILE`` takes another config than
the one beside this file: another tuner, or other machines than this one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import requests
from nni.experiment import Experiment, ExperimentConfig, launcher
from safetensors.torch import save_file

from dscore_plugin.datasets import load_data
from dscore_plugin.errors import DScoreError, ModelError
from dscore_plugin.files import atomic_folder
from dscore_plugin.integrations.nni.experiment import trial

_PATIENCE = 120  # seconds, and unanswered questions in a row
_ATTEMPTS = 3
_WEIGHTS = "weights.safetensors"
_SHARED = ("data", "model", "dense_epochs", "epochs", "macs_weight", "seed")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the experiment to its end and stop it.

    Args:
        arguments: as :func:`parser` reads them.

    Returns:
        The finished trials, best first: ``{"trial", "parameters", "result"}``.

    Raises:
        DScoreError: if the trials cannot start, or all of them fail.
    """
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    config = make_config(arguments, out)
    for attempt in range(_ATTEMPTS):
        finished = run_once(config, arguments.port or free_port(), out)
        if finished is not None:
            return finished
        print(f"NNI's manager gave up before the first trial (attempt {attempt + 1})", file=sys.stderr)
    raise ModelError(f"NNI's manager gave up {_ATTEMPTS} times; its logs lie below {out}")


def run_once(config: ExperimentConfig, port: int, out: Path) -> list[dict[str, Any]] | None:
    """Start an experiment, wait for its end, and stop it.

    Returns:
        The finished trials, best first. None if the manager gave up before the first: it gives the tuner, a process
        that imports much, ten seconds to come up, too little for a busy machine.
    """
    experiment = Experiment(config)
    try:
        start(experiment, port)
        print(f"NNI's web page: http://127.0.0.1:{port}", flush=True)
        came_to_its_end = wait(experiment)
        finished = [
            {"trial": one.trialJobId, "parameters": one.parameter, "result": one.value}
            for one in experiment.export_data()
        ]
        failed = [job.trialJobId for job in experiment.list_trial_jobs() if job.status == "FAILED"]
    finally:
        experiment.stop()
    if failed:
        where = out / experiment.id / "environments"
        print(f"{len(failed)} trials failed; their output lies below {where}", file=sys.stderr)
    if not finished and not failed and not came_to_its_end:
        return None
    if not finished:
        raise ModelError(f"no trial came to its end; look below {out / experiment.id}")
    return sorted(finished, key=lambda item: -_objective(item["result"]))


def make_config(arguments: argparse.Namespace, out: Path) -> ExperimentConfig:
    """Read NNI's config and put the arguments into it; train the dense network once if there are no weights."""
    source = arguments.config or Path(str(files(__package__) / "config.yml"))
    config = ExperimentConfig.load(str(source))
    weights = arguments.weights or train_once(arguments, out)
    shared = {name: getattr(arguments, name) for name in _SHARED} | {"data": absolute(arguments.data)}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in shared.items()]
    command = [sys.executable, "-m", trial.__name__, *words, f"--weights={weights.resolve()}"]
    config.trial_command = shlex.join(command)
    config.max_trial_number = arguments.trials
    config.trial_concurrency = arguments.concurrency
    config.experiment_working_directory = out
    return config


def train_once(arguments: argparse.Namespace, out: Path) -> Path:
    """Train the dense network that all trials start from, unless it lies in ``out`` already."""
    data = hashlib.sha256(absolute(arguments.data).encode()).hexdigest()[:8]
    folder = out / f"{arguments.model}-{arguments.dense_epochs}-{arguments.seed}-{data}"
    if not folder.exists():
        with atomic_folder(folder) as partial:
            print(f"no weights: training {arguments.model} for {arguments.dense_epochs} epochs", flush=True)
            model = trial.dense_network(arguments, load_data(arguments.data, seed=arguments.seed))
            state = {name: value.contiguous() for name, value in model.state_dict().items()}
            save_file(state, partial / _WEIGHTS)
    return folder / _WEIGHTS


def absolute(data: str) -> str:
    """Write a data set's folder so that it is the same one from everywhere: trials run in another folder."""
    name, colon, folder = data.partition(":")
    return f"{name}:{Path(folder).expanduser().absolute()}" if colon and folder else data


def start(experiment: Experiment, port: int) -> None:
    """Start NNI's manager and wait until it answers; NNI waits four seconds, too little for a busy machine."""
    hasty = launcher._check_rest_server
    launcher._check_rest_server = partial(hasty, retry=_PATIENCE)
    try:
        experiment.start(port)
    except (RuntimeError, requests.RequestException) as error:
        raise ModelError(
            f"NNI's manager does not start on port {port}: {type(error).__name__}; choose another --port, or see the "
            "log below the experiment's folder"
        ) from error
    finally:
        launcher._check_rest_server = hasty


def wait(experiment: Experiment) -> bool:
    """Return when the experiment has ended: whether it was done; raise ModelError if the manager does not answer."""
    silent = 0
    while silent < _PATIENCE:
        try:
            status, silent = experiment.get_status(), 0
        except requests.RequestException:  # a busy machine answers late
            status, silent = "", silent + 1
        if status in ("DONE", "STOPPED", "ERROR"):
            return bool(status != "ERROR")
        time.sleep(1)
    raise ModelError(
        f"NNI's manager does not answer; its log lies in {experiment.id}/log below the experiment's folder"
    )


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = trial.parser(__doc__)
    made.add_argument("--trials", type=int, default=12, help="how many to run")
    made.add_argument("--concurrency", type=int, default=1, help="how many at a time")
    made.add_argument("--port", type=int, default=0, help="of the web page; 0 takes a free one")
    made.add_argument("--config", type=Path, help="NNI's config file, for other tuners and training services")
    made.add_argument(
        "--out", type=Path, default=Path("runs/nni"), help="NNI's logs and results.json go there"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment and print its trials, best first."""
    arguments = parser().parse_args(argv)
    try:
        finished = run(arguments)
    except DScoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (arguments.out / "results.json").write_text(json.dumps(finished, indent=1) + "\n", encoding="utf-8")
    for item in finished:
        chosen, result = item["parameters"], item["result"]
        text = "  ".join(f"{name}={value}" for name, value in chosen.items())
        measured = "  ".join(f"{name} {value:.3f}" for name, value in result.items() if name != "default")
        print(f"{_objective(result):8.3f}  {text}  {measured}")
    return 0


def _objective(result: Any) -> float:
    return float(result["default"] if isinstance(result, dict) else result)


if __name__ == "__main__":
    sys.exit(main())
