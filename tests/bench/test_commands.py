"""The command of a cell, given to the command line, asks for the cell's own run."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dscore_plugin import analysis_runs, pipeline
from dscore_plugin.bench.cells import Cell, Place
from dscore_plugin.bench.protocol import Block, Protocol, load_protocol
from dscore_plugin.bench.survey import cells_of
from dscore_plugin.cli import main
from dscore_plugin.errors import DScoreError
from dscore_plugin.jobs import PruneJob
from tests.bench.helpers import PROTOCOL, save_weights, write_protocol

COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks" / "criteria").glob("*.json"))


class CaughtError(DScoreError):
    """Ends a command where its work would begin."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command line asks the pipeline for."""
    found: list[Any] = []

    def catch(*arguments: Any, **_: Any) -> None:
        found.append(arguments)
        raise CaughtError("caught")

    monkeypatch.setattr(pipeline, "run_prune", catch)
    monkeypatch.setattr(analysis_runs, "run_sensitivity", catch)
    return found


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in command.split(" && "):
        monkeypatch.setattr(sys, "argv", shlex.split(part))
        with pytest.raises(SystemExit):
            main()


def cells(protocol: Protocol) -> list[Cell]:
    """The cells, with the best rows taken to be two that need more than a name."""
    found = []
    for block in protocol.blocks:
        names = [row if isinstance(row, str) else "synaptic_strength" for row in block.rows]
        found += cells_of(
            protocol, block, dict.fromkeys([*names, "dcp"] if len(names) < len(block.rows) else names)
        )
    return found


def portable(job: PruneJob) -> dict[str, Any]:
    """What matters of a run, but for paths."""
    content = job.identity()
    content["source"] |= {
        "weights": Path(content["source"]["weights"]).name,
        "data": content["source"]["data"][:7],
    }
    for choice in content["choices"]:
        choice["table"] = choice["table"] and "table"
    return content


def compare(cell: Cell, place: Place, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked.clear()
    run(cell.command(place.data), monkeypatch)
    *before, (job, *_) = asked
    assert portable(job) == portable(cell.job(place))
    if cell.shares_table:
        ((source, choice, out, *_),) = before
        assert str(out / "sensitivity.json") == job.choices[0].table
        assert (source.seed, source.model) == (cell.table_seed, cell.protocol.model)
        assert replace(choice, analysis=cell.analysis) == choice == cell.table_choice()


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_every_command_asks_for_its_cell(
    path: Path, tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = load_protocol(path)
    place = Place("cifar10:somewhere", tmp_path / protocol.weights, tmp_path / "work")
    place.weights.write_bytes(b"")
    seen = {}
    for cell in cells(protocol):  # one of each kind is enough
        seen.setdefault((cell.row, cell.allocation, cell.block.name), cell)
        if cell.seed > 0:
            seen.setdefault(("seed", cell.allocation, cell.block.name), cell)
    for cell in seen.values():
        compare(cell, place, asked, monkeypatch)


def test_every_kind_of_option(tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    block = {
        "name": "b", "rows": ["odd"], "target_macs": [0.4], "seeds": [3], "allocations": ["sensitivity"],
        "training": {"schedule": "steps", "milestones": [2, 3], "mixup": 0.2, "label_smoothing": 0.1},
    }  # fmt: skip
    odd = {
        "criterion": "d_score", "calibration_images": 7, "layers": "inner", "min_channels": 2, "round_to": 4,
        "criterion_options": {"group_reduction": "max"},
    }  # fmt: skip
    changes: dict[str, Any] = {"blocks": [block], "rows": {"odd": odd}, "recalibrate": False}
    changes["training"] = {"epochs": 4, "learning_rate": 0.05, "precision": "float32", "weight_decay": 0.0}
    changes["analysis"] = {**PROTOCOL["analysis"], "early_exit": 5.0, "fold_batchnorm": True, "rerank": True}
    protocol = load_protocol(write_protocol(tmp_path, **changes))
    place = Place("digits", save_weights(tmp_path), tmp_path / "work")
    (cell,) = cells(protocol)
    compare(cell, place, asked, monkeypatch)


def test_a_cell_is_the_same_on_other_machines_and_another_with_other_settings(tmp_path: Path) -> None:
    protocol = load_protocol(write_protocol(tmp_path, training={"epochs": 6}))
    block = Block("b", ("l1",), (0.5,))
    rounds = replace(block, rounds=2, round_epochs=2)
    one = Cell(protocol, block, "l1", "uniform", 0.5, 0)
    assert (
        one.id
        == Cell(replace(protocol, folder=Path("elsewhere"), name="other"), block, "l1", "uniform", 0.5, 0).id
    )
    others = [
        Cell(protocol, block, "l2", "uniform", 0.5, 0),
        Cell(protocol, block, "l1", "sensitivity", 0.5, 0),
        Cell(protocol, block, "l1", "uniform", 0.4, 0),
        Cell(protocol, block, "l1", "uniform", 0.5, 1),
        Cell(protocol, replace(block, training={"distill": 0.5}), "l1", "uniform", 0.5, 0),
        Cell(protocol, rounds, "l1", "uniform", 0.5, 0),
        Cell(replace(protocol, recalibrate=False), block, "l1", "uniform", 0.5, 0),
    ]  # fmt: skip
    assert len({one.id, *(cell.id for cell in others)}) == 8


def test_weights_of_other_content_go_to_folders_of_their_own(tmp_path: Path) -> None:
    protocol = load_protocol(write_protocol(tmp_path))
    cell = Cell(protocol, Block("b", ("l1",), (0.5,)), "l1", "sensitivity", 0.5, 0)
    places = []
    for content in (b"one", b"two"):
        file = tmp_path / content.decode()
        file.write_bytes(content)
        places.append(Place("digits", file, tmp_path / "work"))
    assert len({cell.folder(place) for place in places}) == 2
    assert len({cell.table_folder(place) for place in places}) == 2


@pytest.mark.parametrize(("row", "seeds"), [("l1", {0}), ("random", {0, 1, 2}), ("taylor", {0, 1, 2})])
def test_seeds_share_a_sensitivity_table_unless_the_scores_depend_on_them(
    tmp_path: Path, row: str, seeds: set[int]
) -> None:
    protocol = load_protocol(write_protocol(tmp_path))
    block = Block("b", (row,), (0.5,), seeds=(0, 1, 2), allocations=("sensitivity",))
    assert {cell.table_seed for cell in cells_of(protocol, block, [row])} == seeds
