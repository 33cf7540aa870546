"""What a user gets by installing and importing the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dscore_plugin

ROOT = Path(__file__).resolve().parents[1]


def test_the_import_loads_none_of_the_tools(tmp_path: Path) -> None:
    code = (
        "import sys, dscore_plugin, dscore_plugin.registry; dscore_plugin.list_criteria();"
        "print([m for m in ('nni', 'timm', 'torch_pruning', 'matplotlib', 'sklearn', 'torch') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_python_started_in_a_checkout_finds_the_integrations() -> None:
    code = "import dscore_plugin; print(dscore_plugin.DScoreImportance.__name__, dscore_plugin.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split()[0] == "DScoreImportance"
    assert Path(run.stdout.split()[1]).is_relative_to(ROOT)


@pytest.mark.parametrize("name", dscore_plugin.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(dscore_plugin, name).__doc__


def test_every_folder_of_code_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        file.parent.relative_to(ROOT).as_posix()
        for top in ("dscore_plugin", "integrations")
        for file in (ROOT / top).rglob("*.py")
    }
    names = {("dscore_plugin/" + f if f.startswith("integrations") else f).replace("/", ".") for f in folders}
    assert names == set(listed)
