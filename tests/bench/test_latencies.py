from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dscore_plugin.bench import latencies
from dscore_plugin.bench.latencies import in_turns, measure_latencies
from dscore_plugin.bench.protocol import load_protocol
from dscore_plugin.bench.records import read_records
from dscore_plugin.bench.runner import run_bench
from dscore_plugin.costs import count
from dscore_plugin.errors import ArtifactError
from dscore_plugin.files import write_json
from tests.bench.helpers import PROTOCOL, place, write_protocol


def test_the_pair_with_the_median_ratio_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, pruned = nn.Linear(1, 1), nn.Linear(1, 1)
    times = {dense: [9.0, 4.0, 8.0], pruned: [1.0, 4.0, 4.0]}
    turns: list[nn.Module] = []

    def latency(model: nn.Module, shape: object) -> dict[str, dict[str, float]]:
        turns.append(model)
        median = times[model][turns.count(model) - 1]
        return {"1": {"median": median, "iqr": 0.0}, "64": {"median": 1.0, "iqr": 0.0}}

    monkeypatch.setattr(latencies, "latency", latency)
    found = in_turns(dense, pruned, (3, 32, 32))
    assert found["1"] == {"dense": {"median": 8.0, "iqr": 0.0}, "pruned": {"median": 4.0, "iqr": 0.0}}
    assert list(found) == ["1", "64"]
    assert turns == [dense, pruned] * 3


def test_latencies_of_finished_cells_are_measured_again_and_nothing_else_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [{**PROTOCOL["blocks"][0], "rows": ["l1", "random"]}]
    protocol, here, out = (
        load_protocol(write_protocol(tmp_path, blocks=blocks)),
        place(tmp_path),
        tmp_path / "out.json",
    )
    with pytest.raises(ArtifactError):
        measure_latencies(protocol, here, out)
    run_bench(protocol, here, out, only=["l1"])
    (before,) = read_records(out)

    def latency(model: nn.Module, shape: tuple[int, ...]) -> dict[str, dict[str, float]]:
        return {
            b: {"median": float(count(model, (torch.zeros(1, *shape),))[0]), "iqr": 0.0} for b in ("1", "64")
        }

    monkeypatch.setattr(latencies, "latency", latency)
    said: list[str] = []
    measure_latencies(protocol, here, out, say=said.append)
    (after,) = read_records(out)
    pair = after["latency_ms"]["64"]
    assert pair["pruned"]["median"] / pair["dense"]["median"] == pytest.approx(before["macs_kept"], abs=1e-3)
    assert {**after, "latency_ms": 0} == {**before, "latency_ms": 0}
    assert [line.partition(":")[0] for line in said] == ["l1-uniform-50off-1epochs-seed0"]
    run_bench(protocol, here, out, only=["l1"])  # the work folder holds the same numbers
    assert read_records(out) == [after]

    write_json(out, [{**after, "hardware": "another machine"}])
    measure_latencies(protocol, here, out, say=said.append)
    assert "measured on another machine" in said[-1]
    assert read_records(out) == [{**after, "hardware": "another machine"}]


def test_a_network_that_is_not_there_any_more_is_pruned_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [
        {
            "name": "one go",
            "rows": ["random", "l1"],
            "target_macs": [0.5],
            "allocations": ["uniform", "sensitivity"],
        },
        {"name": "rounds", "rows": ["l1"], "target_macs": [0.5], "rounds": 2, "round_epochs": 1},
    ]
    training = {**PROTOCOL["training"], "epochs": 2}
    protocol = load_protocol(write_protocol(tmp_path, blocks=blocks, training=training))
    here, out = place(tmp_path), tmp_path / "out.json"
    run_bench(protocol, here, out)
    before = read_records(out)

    def macs(model: nn.Module, shape: tuple[int, ...]) -> dict[str, dict[str, float]]:
        return {"1": {"median": float(count(model, (torch.zeros(1, *shape),))[0]), "iqr": 0.0}}

    monkeypatch.setattr(latencies, "latency", macs)
    moved = type(here)(here.data, here.weights, tmp_path / "another folder", here.device)
    said: list[str] = []
    measure_latencies(protocol, moved, out, say=said.append)
    after = read_records(out)
    news = [line for line in said if not line.startswith("saved")]
    assert len(news) == len(after) == 5
    assert "its network is not in" in news[-1]
    assert "each round chooses" in news[-1]
    assert after[-1] == before[-1]
    for old, new in zip(before[:-1], after[:-1], strict=True):
        pair = new["latency_ms"]["1"]
        assert pair["pruned"]["median"] / pair["dense"]["median"] == pytest.approx(old["macs_kept"], abs=1e-3)
        assert {**new, "latency_ms": 0} == {**old, "latency_ms": 0}

    write_json(out, [{**entry, "params_kept": 0.1} for entry in after])
    measure_latencies(protocol, moved, out, only=["random"], say=said.append)
    assert "other sizes" in said[-1]
    assert read_records(out) == [{**entry, "params_kept": 0.1} for entry in after]
