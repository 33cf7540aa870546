from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dscore_plugin.bench import command
from dscore_plugin.bench.protocol import load_protocol
from dscore_plugin.bench.survey import survey
from dscore_plugin.cli import main
from tests.bench.helpers import PROTOCOL, place, record, save_weights, write_protocol

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dscore(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run ``dscore bench ...`` in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dscore", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def test_help_shows_examples(dscore: Run) -> None:
    code, out, _ = dscore("--help")
    assert code == 0
    assert "dscore bench benchmarks/criteria/resnet20.json" in out
    assert "--json" in out


def test_a_protocol_is_listed_run_and_shown(dscore: Run, tmp_path: Path) -> None:
    blocks = [{**PROTOCOL["blocks"][0], "rows": ["l1", "energy"]}]
    path, weights = write_protocol(tmp_path, blocks=blocks), save_weights(tmp_path)
    common = (
        path,
        "--data",
        "digits",
        "--weights",
        weights,
        "--device",
        "cpu",
        "--work",
        "w",
        "--out",
        "r.json",
    )
    code, out, err = dscore(*common, "--list", "--json")
    assert code == 0, err
    listed = json.loads(out)
    assert [cell["state"] for cell in listed["cells"]] == ["to do", "to do"]
    assert listed["seconds_left"] is None

    code, out, err = dscore(*common, "--only", "l1", "--plot", "pictures", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert [cell["row"] for cell in answer["cells"]] == ["l1"]
    assert answer["missing"] == []
    assert answer["pictures"] == ["pictures/r_bars.png"]
    assert (tmp_path / "pictures" / "r_bars.svg").exists()

    code, out, err = dscore(path, "--table", "r.json")  # beside the protocol it says what did not run
    assert code == 0, err
    assert "| `l1` | uniform | 1 |" in out
    assert "- energy-uniform-50off-1epochs-seed0: not run" in out
    assert "energy" not in dscore("--table", "r.json")[1]

    code, out, err = dscore(*common)
    assert code == 1  # a cell failed
    assert "energy-uniform-50off-1epochs-seed0: failed: ModelError" in out
    code, out, err = dscore(*common, "--only", "l1", "--latency")
    assert code == 0, err
    assert "l1-uniform-50off-1epochs-seed0: " in err
    code, out, _ = dscore(*common, "--list")
    assert out.splitlines()[0].startswith("done            l1-")
    assert "cells to run: 1 of 2, less than a minute" in out


def test_results_are_shown_without_a_protocol(dscore: Run, tmp_path: Path) -> None:
    (tmp_path / "criteria_x.json").write_text(json.dumps([record("l1"), record("l2", finetuned=75.0)]))
    (tmp_path / "page.md").write_text("<!-- begin criteria_x -->\n<!-- end criteria_x -->\n")
    code, out, err = dscore("--table", "criteria_x.json", "--into", "page.md")
    assert code == 0, err
    assert out.index("`l2`") < out.index("`l1`")
    assert out.strip() in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a protocol"),
        (["tiny.json"], "pass --weights FILE"),
        (["missing.json", "--weights", "w"], "missing.json is missing"),
        (["tiny.json", "--weights", "w", "--data", "digits", "--list"], "expected the weights of digits_cnn"),
        (["tiny.json", "--weights", ".", "--data", "digits", "--list"], "expected the weights of digits_cnn"),
        (["--table", "x.json", "--only", "l1"], "--only chooses what runs"),
        (["--table", "missing.json"], "missing.json is missing"),
        (["tiny.json", "--redo", "--latency"], "--latency runs no cell"),
        (["tiny.json", "--weights", "w", "--data", "digits"], "expected the weights of digits_cnn"),
    ],
)
def test_bad_input(dscore: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    write_protocol(tmp_path)
    code, _, err = dscore(*arguments)
    assert code == 2
    assert message in err


def test_a_page_without_a_place_is_refused_before_any_cell_runs(
    dscore: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run_bench", lambda *_, **__: pytest.fail("it ran"))
    path, weights = write_protocol(tmp_path), save_weights(tmp_path)
    code, _, err = dscore(path, "--data", "digits", "--weights", weights, "--into", "page.md")
    assert code == 2
    assert "page.md has no place for the tables" in err


@pytest.mark.parametrize(("only", "expected"), [("l1", 0), ("random", 1)])
def test_the_exit_code_tells_of_the_cells_that_were_asked_for(
    dscore: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: str, expected: int
) -> None:
    path, here = write_protocol(tmp_path), place(tmp_path)
    cells = {entry.cell.row: entry.cell for entry in survey(load_protocol(path), []).entries}
    mine = {
        row: {"id": cell.id, "weights": {"file": "", "sha256": here.digest}} for row, cell in cells.items()
    }
    records = [{**record("l1"), **mine["l1"]}, {**record("random", failed="out of memory"), **mine["random"]}]
    found = survey(load_protocol(path), records, here).only([only])
    monkeypatch.setattr(command, "run_bench", lambda *_, **__: found)
    (tmp_path / "r.json").write_text(json.dumps(records))
    code, _, err = dscore(
        path, "--data", "digits", "--weights", here.weights, "--out", "r.json", "--only", only
    )
    assert code == expected, err
