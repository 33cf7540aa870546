"""What test_discrimination_aware.py kills: a choice that dies while it writes down its second layer."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from dscore_plugin.selection.discrimination_run import TuningData
from dscore_plugin.selection.journal import Journal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.selection.test_discrimination_aware import batches, choose, network  # noqa: E402


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    add, written = Journal.add, []

    def counted(self: Journal, record: object) -> None:
        if written:
            self._append('{"layer": "blocks.1')
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, record)
        written.append(record)

    Journal.add = counted
    tuning = TuningData.of(batches(4))
    choose(network(), data=batches(4), tuning=tuning, order="stages", head_epochs=1, work=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
