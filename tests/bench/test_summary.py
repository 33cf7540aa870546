from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from dscore_plugin.bench.summary import draw, group_records, tables, write_into
from dscore_plugin.errors import BenchError
from dscore_plugin.report import criteria_plot
from tests.bench.helpers import record

SEEDS = [record("l1", seed=seed, finetuned=top1) for seed, top1 in enumerate((88.0, 89.0, 90.6))]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    figures: list[Any] = []
    save = criteria_plot.save_figure
    monkeypatch.setattr(
        criteria_plot, "save_figure", lambda figure, path: figures.append(figure) or save(figure, path)
    )
    return figures


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]


def test_a_table_has_means_and_spreads_the_best_first() -> None:
    energy = record("energy", finetuned=89.5, granularity="layer", macs_kept=0.449)
    rounds = record("d_score", finetuned=80.0, rounds=3, distill=0.9)
    text = tables([rounds, *SEEDS, energy])
    head, _, *body = rows(text)
    assert [row[0] for row in body] == ["`energy` (layers)", "`l1`", "`d_score` (3 rounds, distilled)"]
    l1 = dict(zip(head, body[1], strict=True))
    assert l1 == {
        "criterion": "`l1`", "allocation": "uniform", "seeds": "3", "pruned": "20.00 (20.00 to 20.00)",
        "recalibrated": "50.00 (50.00 to 50.00)", "fine-tuned": "89.20 (88.00 to 90.60)", "MACs kept": "49.0%",
        "params kept": "50.0%", "speed-up, batch 1": "2.00x", "speed-up, batch 64": "2.00x", "scoring (s)": "0.5",
    }  # fmt: skip
    assert dict(zip(head, body[0], strict=True))["fine-tuned"] == "89.50"
    assert "cifar_resnet20, 50 % of the MACs removed, 15 epochs of fine-tuning" in text
    assert "dense 91.67 %, 40.9 M MACs, 269,722 parameters; 9,827 test images; mean over the seeds" in text
    assert "Measured on: a processor, 2 threads." in text


def test_only_what_compares_shares_a_table() -> None:
    others = [
        record("l1"), record("l1", target_macs=0.35), record("l1", epochs=8), record("l1", model="cifar_resnet56"),
        record("l1", weights={"file": "w", "sha256": "1"}), record("d_score", epochs=8),
    ]  # fmt: skip
    assert [len(group.lines) for group in group_records(others)] == [1, 1, 2, 1, 1]


def command(options: str = "", seed: int = 0) -> str:
    """The command of a cell by sensitivity, as one machine or another writes it."""
    data = ("--data cifar10", "--data cifar10:PATH")[seed % 2]
    seeded = f"--seed {seed} " if seed else ""
    return (
        f"dscore sensitivity {data} {seeded}--criterion l1 --out sensitivity/l1-seed{seed} && dscore prune {data} "
        f"{seeded}--criterion l1 --target-macs 0.5 --sensitivity sensitivity/l1-seed{seed}/sensitivity.json "
        f"--epochs 9 {options}".strip()
        + f" --out runs/l1-seed{seed}"
    )


def test_a_line_holds_the_seeds_of_one_run_and_says_what_sets_it_apart() -> None:
    records = [
        *(record("l1", seed=seed, finetuned=90.0, command=command(seed=seed)) for seed in (0, 1)),
        *(record("l1", seed=seed, finetuned=80.0, command=command("--mixup 0.2", seed)) for seed in (0, 1)),
        record("l1", finetuned=70.0, command=command("--criterion-option group_reduction=max --rerank")),
        record("l1", finetuned=60.0, distill=0.5, command=command("--distill 0.5")),
        record("l1", finetuned=50.0, distill=0.9, command=command("--distill 0.9")),
        record("l2", finetuned=40.0, command=command("--mixup 0.2")),
        record("l1", finetuned=30.0, rounds=3, command=command("--rounds 3 --round-epochs 3")),
        record("l2", finetuned=20.0, epochs=8, command=command("--mixup 0.2")),
    ]
    assert [[(line.label, len(line.records)) for line in group.lines] for group in group_records(records)] == [
        [
            ("l1", 2), ("l1 (mixup 0.2)", 2), ("l1 (group_reduction=max, rerank)", 1),
            ("l1 (distilled, distill 0.5)", 1), ("l1 (distilled, distill 0.9)", 1), ("l2 (mixup 0.2)", 1),
            ("l1 (3 rounds)", 1),
        ],
        [("l2", 1)],
    ]  # fmt: skip


def test_missing_numbers_and_failures_are_said() -> None:
    bare = record("l2", top1_recalibrated=None, scoring_seconds=None)
    failed = record("dcp", failed="MemoryError: no more", top1_finetuned=None)
    text = tables([bare, failed])
    assert rows(text)[2][4] == "–"
    assert rows(text)[2][-1] == "–"
    assert "- dcp, uniform, 50 % removed, seed 0: failed: MemoryError: no more" in text
    assert tables([]) == "No cell is finished."


def test_tables_go_between_the_markers_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin one -->\nold\n<!-- end one -->\nafter\n")
    write_into(page, "one", "new")
    write_into(page, "one", "newer")
    assert page.read_text() == "before\n<!-- begin one -->\n\nnewer\n\n<!-- end one -->\nafter\n"
    with pytest.raises(BenchError, match="no place for the tables.*begin two"):
        write_into(page, "two", "new")
    with pytest.raises(BenchError, match="no place"):
        write_into(tmp_path / "missing.md", "one", "new")


def test_bars_end_at_the_means_and_whiskers_at_the_extremes(tmp_path: Path, drawn: list[Any]) -> None:
    (png,) = draw(
        [*SEEDS, record("d_score", finetuned=80.0, allocation="sensitivity")], tmp_path / "new", "criteria_x"
    )
    assert png == tmp_path / "new" / "criteria_x_bars.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    whole, close = drawn[0].axes
    assert [bar.get_width() for bar in whole.patches] == pytest.approx([20, 20, 50, 50, 89.2, 80])
    (points,) = close.containers
    assert list(points[0].get_xdata()) == pytest.approx([89.2, 80])
    (whiskers,) = points[2]
    assert [float(x) for x in whiskers.get_segments()[0][:, 0]] == pytest.approx([88.0, 90.6])
    svg = ElementTree.parse(png.with_suffix(".svg")).iter("{http://www.w3.org/2000/svg}text")
    texts = {"".join(node.itertext()) for node in svg}
    assert {"l1, uniform", "d_score, sensitivity", "dense: 91.67 %", "fine-tuned"} <= texts


def test_accuracy_over_macs_where_there_are_several_targets(tmp_path: Path, drawn: list[Any]) -> None:
    records = [
        record(row, seed=seed, target_macs=target, macs_kept=target - 0.01, finetuned=100 * target + seed,
               allocation=allocation)
        for row, allocation in (("l1", "uniform"), ("d_score", "uniform"), ("l1", "sensitivity"))
        for target in (0.5, 0.7, 0.35)
        for seed in (0, 1)
    ]  # fmt: skip
    pictures = draw([*records, record("l1", epochs=3)], tmp_path, "x")
    assert [picture.name for picture in pictures] == [
        "x_bars_1.png", "x_bars_2.png", "x_bars_3.png", "x_bars_4.png", "x_macs_1.png",
    ]  # fmt: skip
    panels = drawn[-1].axes
    assert [panel.get_title() for panel in panels] == ["allocation: uniform", "allocation: sensitivity"]
    assert [len(panel.containers) for panel in panels] == [2, 1]
    curve = panels[0].containers[0][0]
    assert list(curve.get_xdata()) == pytest.approx([34, 49, 69])
    assert list(curve.get_ydata()) == pytest.approx([35.5, 50.5, 70.5])


def test_a_curve_holds_one_run_of_one_network(tmp_path: Path, drawn: list[Any]) -> None:
    records = [
        record("l1", target_macs=target, weights={"file": "w", "sha256": weights}, command=options)
        for weights, target, options in (
            ("1", 0.5, ""), ("1", 0.3, ""), ("1", 0.5, "x --mixup 0.2"), ("1", 0.7, "x --mixup 0.2"),
            ("2", 0.5, ""), ("2", 0.3, ""), ("3", 0.5, ""),
        )
    ]  # fmt: skip
    pictures = [picture.name for picture in draw(records, tmp_path, "x")]
    assert pictures[-2:] == ["x_macs_1.png", "x_macs_2.png"]
    lengths = [[len(line.containers) for line in figure.axes] for figure in drawn[-2:]]
    assert lengths == [[2], [1]]
    assert [len(curve[0].get_xdata()) for curve in drawn[-2].axes[0].containers] == [2, 2]


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="nothing to draw"):
        draw([record("l1", failed="x")], tmp_path, "x")
