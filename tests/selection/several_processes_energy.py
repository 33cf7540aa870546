"""What test_energy.py runs under ``torchrun``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.selection.test_energy import chosen  # noqa: E402


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    plan = chosen(work=folder / "work")
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(plan.to_dict()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
