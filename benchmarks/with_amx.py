"""Run ``dscore`` with the kernels for CPUs with AMX (``amx``), one thread a process.

    python benchmarks/with_amx.py bench benchmarks/criteria/resnet20.json --data cifar10:PATH --weights FILE

Every other command of ``dscore`` works the same way.
"""

from __future__ import annotations

import sys

import torch
from amx import REQUIREMENT, available, fast_training

from dscore_plugin.cli import main

if __name__ == "__main__":
    if not available():
        sys.exit(f"{REQUIREMENT}; elsewhere run dscore itself")
    torch.set_num_threads(1)
    with fast_training():
        main()
