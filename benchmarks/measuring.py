"""What the benchmarks have in common: their command lines, and what a result says of where it was measured."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch

from dscore_plugin.bench.hardware import processor_name


def command() -> str:
    """Return the command line as anyone can repeat it: the folders of this machine are left out."""
    words = [word.partition(":")[0] + ":PATH" if ":/" in word else word for word in sys.argv[1:]]
    words = [Path(word).name if "/" in word else word for word in words]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def here() -> dict[str, object]:
    """Return what a number depends on besides the code: processor, threads, versions."""
    return {
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def floats(text: str) -> tuple[float, ...]:
    """Read numbers separated by commas."""
    return tuple(map(float, text.split(",")))


def ints(text: str) -> tuple[int, ...]:
    """Read whole numbers separated by commas."""
    return tuple(map(int, text.split(",")))
