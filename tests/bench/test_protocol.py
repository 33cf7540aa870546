from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from dscore_plugin.bench.protocol import NO_OPTIONS, Best, load_protocol
from dscore_plugin.cli import prune
from dscore_plugin.errors import DScoreError
from dscore_plugin.registry import list_criteria
from dscore_plugin.training.config import NO_EFFECT, TrainingConfig
from tests.bench.helpers import write_protocol

COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks" / "criteria").glob("*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_protocols_are_valid(path: Path) -> None:
    protocol = load_protocol(path)
    assert protocol.name == path.stem
    assert protocol.training["epochs"] >= 8


def test_every_criterion_that_keeps_a_budget_of_channels_is_a_row() -> None:
    first = load_protocol(next(path for path in COMMITTED if path.stem == "resnet20")).blocks[0]
    channels = {
        info.name for info in list_criteria(lambda i: "channel" in i.granularity and not i.stops_by_itself)
    }
    assert set(first.rows) == channels | {"energy"}


def test_the_rows_and_the_best(tmp_path: Path) -> None:
    blocks = [
        {"name": "all rows", "rows": ["l1", "mine"], "target_macs": [0.5, 0.3]},
        {"name": "best", "rows": ["l1", {"best": 2, "of": "all", "from": "all rows"}], "target_macs": [0.5]},
    ]
    rows = {"mine": {"criterion": "dcp", "criterion_options": {"selection_images": 64}}}
    protocol = load_protocol(write_protocol(tmp_path, blocks=blocks, rows=rows))
    assert protocol.blocks[0].target_macs == (0.5, 0.3)
    assert protocol.blocks[1].rows == ("l1", Best(2, "all", "all rows"))
    assert protocol.settings("mine") == rows["mine"]
    assert protocol.settings("l1") == {"criterion": "l1"}


def block(**changes: Any) -> dict[str, Any]:
    return {"blocks": [{"name": "b", "rows": ["l1"], "target_macs": [0.5], **changes}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modell": "x"}, "no field 'modell'; did you mean 'model'"),
        ({"blocks": []}, "blocks=\\[\\] is not valid; expected a list"),
        ({"blocks": ["all"]}, "the block 'all' is no object"),
        (block(rows=["l3"]), "criterion 'l3' is unknown"),
        (block(rows=[3]), "the row 3 is not valid"),
        (block(seed=[1]), "the block 'b' has no field 'seed'; did you mean 'seeds'"),
        (block(target_macs=[1.5]), "target_macs"),
        (block(allocations=["even"]), "allocation 'even' is unknown"),
        (block(rounds=2), "rounds of 2 or more with round_epochs"),
        (block(rounds=2, round_epochs=1), "no epoch of 1 for the last round"),
        (block(training={"momentum": 0.5}), "the training has no field 'momentum'"),
        (block(training={"learning_rat": 0.5}), "did you mean 'learning_rate'"),
        (block(training={"epochs": 0}), "epochs=0"),
        (block(rows=[{"best": 1}]), "no block before it"),
        (block(rows=[{"best": 0, "from": "x.json"}]), "asks for the best 0"),
        (block(rows=[{"best": 1, "of": "theirs", "from": "x.json"}]), "'theirs'"),
        (block(rows=[{"best": 1, "form": "x.json"}]), "no field 'form'"),
        ({"rows": {"l1": {"ratio": 0.5}}}, "row 'l1' has no field 'ratio'"),
        ({"rows": {"l1": 5}}, "the row 'l1' is 5; expected an object"),
        ({"rows": {"l1": {"layers": 5}}}, "the row 'l1' has layers=5; expected text"),
        ({"recalibrate": 1}, "the protocol has recalibrate=1; expected true or false"),
        ({"training": {"batch_size": 64}}, "the training lacks 'epochs'"),
        ({"training": 3}, "the protocol has training=3; expected an object"),
        ({"analysis": {"image": 5}}, "the analysis has no field 'image'; did you mean 'images'"),
        ({"analysis": {"images": None}}, "the analysis has images=null; expected a whole number"),
        ({"analysis": {"ratios": ["0.5"]}}, "expected a list, each a number"),
        (block(target_macs=0.5), "target_macs=0.5 is not valid; expected a list"),
        (block(target_macs=["0.5"]), "the block 'b' has target_macs=.*expected a list, each a number"),
        (block(seeds=3), "seeds=3 is not valid; expected a list"),
        (block(seeds=[True]), "expected a list, each a whole number"),
        (block(seeds=[-1]), "seed=-1"),
        (block(training={"learning_rate": "0.1"}), "the training has learning_rate='0.1'; expected a number"),
        (block(training={"milestones": 3}), "the training has milestones=3; expected a list"),
        (block(rows=[{"best": "3", "from": "x.json"}]), "the row has best='3'; expected a whole number"),
        (block(target_macs=[50], rows=[{"best": 1, "from": "x.json"}]), "target_macs"),
        ({"blocks": block()["blocks"] * 2}, "names of their own"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DScoreError, match=message):
        load_protocol(write_protocol(tmp_path, **changes))


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('{"name": "x", "blocks": [{"name": "b", "rows": ["l1"], "target_macs": [0.5]}]}')
    with pytest.raises(DScoreError, match="lacks 'about' and 'model'"):
        load_protocol(path)
    path.write_text("[]")
    with pytest.raises(DScoreError, match="expected an object"):
        load_protocol(path)


def test_a_training_field_of_a_protocol_is_an_option_of_the_command_line() -> None:
    """Else the command of a cell could not repeat it."""
    options = set(prune.__signature__.parameters)  # type: ignore[attr-defined]
    settable = {item.name for item in fields(TrainingConfig)} - set(NO_OPTIONS) - set(NO_EFFECT)
    assert settable <= options
