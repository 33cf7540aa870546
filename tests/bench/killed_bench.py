"""What test_runner.py runs in a process of its own: a benchmark, killed in the fine-tuning of its second cell."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from dscore_plugin.bench.cells import Place
from dscore_plugin.bench.protocol import load_protocol
from dscore_plugin.bench.runner import run_bench
from dscore_plugin.training import loop


def kill_at_checkpoint(number: int) -> None:
    """Kill this process right after it has written so many checkpoints."""
    save, written = loop.save_checkpoint, []

    def save_checkpoint(*arguments: Any) -> None:
        save(*arguments)
        written.append(None)
        if len(written) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.save_checkpoint = save_checkpoint  # type: ignore[assignment]


if __name__ == "__main__":
    protocol, weights, work, out = map(Path, sys.argv[1:])
    kill_at_checkpoint(3)
    run_bench(load_protocol(protocol), Place("digits", weights, work, "cpu"), out)
