"""What test_sensitivity.py runs in other processes: under ``torchrun``, or until it is killed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from dscore_plugin.selection.journal import Journal
from dscore_plugin.selection.sensitivity import Sensitivity, sensitivity_analysis

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.selection.helpers import labelled_images, network, scored_groups  # noqa: E402

SHAPE = (1, 8, 8)
OPTIONS = {"ratios": (0.1, 0.3, 0.5, 0.7, 0.9), "batch_size": 16, "early_exit": 60.0, "criterion": "random"}


def measure(**options: object) -> Sensitivity:
    """The same analysis wherever it is called; 60 images in 4 parts of one batch each."""
    torch.set_num_threads(1)
    model = network("digits_cnn")
    images = labelled_images(model, 60, SHAPE, wrong=5)
    return sensitivity_analysis(
        model, scored_groups(model, SHAPE), images, memory_limit=80_000, **{**OPTIONS, **options}
    )


def kill_after(records: int) -> None:
    """Let the journal kill the process, as ``kill -9`` would, in the middle of a line."""
    add, written = Journal.add, []

    def counted(self: Journal, record: object) -> None:
        if len(written) == records:
            self._append('{"layer": "features.0", "images": [0')
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, record)
        written.append(record)

    Journal.add = counted


def main(task: str, folder: Path) -> None:
    if task == "killed":
        kill_after(5)
    table = measure(checkpoint=folder / "measured.jsonl")
    table.save(folder / os.environ.get("RANK", "0"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
