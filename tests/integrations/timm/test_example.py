from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "prune_timm.py"


def test_the_example_prunes_saves_and_loads(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--model", "test_vit", "--out", str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(float, re.findall(r"([\d.]+) M(?: ->| \()", done.stdout)[:2])
    assert 0.3 < after / before < 0.7
    assert "loaded outputs are equal: True" in done.stdout
    assert (tmp_path / "model" / "model.safetensors").exists()
