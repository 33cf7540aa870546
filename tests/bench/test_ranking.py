from __future__ import annotations

from dscore_plugin.bench.ranking import best_rows
from tests.bench.helpers import record

ROWS = {"random": 60.0, "l1": 90.0, "d_score": 70.0, "d_step": 80.0, "d_step_gm": 75.0, "taylor": 85.0}


def test_the_best_three_are_ours_by_validation_top1() -> None:
    records = [record(row, validation=top1, finetuned=100 - top1) for row, top1 in ROWS.items()]
    assert best_rows(records, 3) == ["d_step", "d_step_gm", "d_score"]
    assert best_rows(records[::-1], 3) == ["d_step", "d_step_gm", "d_score"]
    assert best_rows(records, 2, "all") == ["l1", "taylor"]
    assert best_rows(records, 2, "all", without=["l1"]) == ["taylor", "d_step"]
    assert best_rows(records, 9) == ["d_step", "d_step_gm", "d_score"]
    assert best_rows([], 3) == []


def test_only_cells_that_compare_are_asked() -> None:
    others = [
        record("d_step", validation=99, allocation="sensitivity"),
        record("d_step_gm", validation=99, rounds=3),
        record("dependency_aware", validation=99, distill=0.9),
        record("energy", validation=99, granularity="layer"),
        record("coarse", validation=99, failed="MemoryError"),
        record("dcp", validation=None),
        record("d_step", validation=99, seed=1),
    ]
    ours = [record("d_score", validation=50), record("d_step", validation=40)]
    assert best_rows([*others, *ours], 3) == ["d_score", "d_step"]
    assert best_rows([*ours, *others], 3) == ["d_score", "d_step"]


def test_only_cells_of_one_schedule_are_compared() -> None:
    """That of most rows, or else the first; of several settings of a row the last count."""
    ours = [record("d_score", validation=50), record("d_step", validation=40)]
    other = record(
        "d_step", validation=99, command="dscore prune --criterion d_step --mixup 0.2 --out runs/x"
    )
    assert best_rows([*ours, other], 2) == best_rows([other, *ours], 2) == ["d_score", "d_step"]
    longer = [record(row, validation=top1, epochs=30) for row, top1 in (("d_step", 80), ("d_score", 70))]
    assert best_rows([*ours, *longer], 2) == ["d_score", "d_step"]
    assert best_rows([*longer, *ours], 2) == ["d_step", "d_score"]
    again = record(
        "d_step", validation=60, command="dscore prune --criterion d_step --round-to 8 --out runs/x"
    )
    assert best_rows([*ours, again], 2) == ["d_step", "d_score"]


def test_equals_keep_the_order_of_the_registry() -> None:
    records = [record(row, validation=70) for row in ("synaptic_strength", "d_step", "d_score")]
    assert best_rows(records, 3) == ["d_score", "d_step", "synaptic_strength"]


def test_several_targets_count_by_their_mean_and_incomplete_rows_do_not() -> None:
    records = [
        record(row, validation=top1, target_macs=target)
        for row, tops in {"d_score": (80, 60), "d_step": (75, 70)}.items()
        for target, top1 in zip((0.7, 0.35), tops, strict=True)
    ]
    assert best_rows([*records, record("d_step_gm", validation=95, target_macs=0.7)], 3) == [
        "d_step",
        "d_score",
    ]
