from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "use_with_torch_pruning.py"


def test_the_example_prunes_with_the_importance_alone() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--ratio", "0.3", "--global-pruning"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    before, after = map(float, re.findall(r"([\d.]+) M(?: ->| \()", done.stdout)[:2])
    assert before == 1822.2
    assert 0.4 < after / before < 0.9
    assert re.findall(r"from dscore_plugin.*", EXAMPLE.read_text()) == [
        "from dscore_plugin import DScoreImportance"
    ]
