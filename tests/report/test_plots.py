from __future__ import annotations

import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dscore_plugin.errors import ArtifactError, DScoreError
from dscore_plugin.report import plots
from dscore_plugin.report.plots import plot_sensitivity
from dscore_plugin.selection.sensitivity import RATIOS, Sensitivity, ratio_key


def falling(layers: int, **options: Any) -> Sensitivity:
    """Curves that fall from 93.3 to 10, each later than the one before it."""
    middles = [0.2 + 0.9 * place / max(1, layers - 1) for place in range(layers)]
    curves = {
        f"layer{1 + place // 9}.{place % 9}.conv1": {
            ratio_key(ratio): 93.3 - 83.3 / (1 + math.exp(10 * (middle - ratio))) for ratio in RATIOS
        }
        for place, middle in enumerate(middles)
    }
    orders = {layer: tuple(range(16)) for layer in curves}
    return Sensitivity(93.3, 2000, RATIOS, curves, orders, "d_score", **options)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    figures: list[Any] = []
    save = plots.save_figure

    def keep(figure: Any, path: Path) -> tuple[Path, Path]:
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "save_figure", keep)
    return figures


def texts(svg: Path) -> list[str]:
    namespace = "{http://www.w3.org/2000/svg}"
    return ["".join(node.itertext()) for node in ElementTree.parse(svg).iter(f"{namespace}text")]


def test_every_layer_is_named_once_and_every_point_is_there(tmp_path: Path, drawn: list[Any]) -> None:
    table = falling(27)
    png, svg = plot_sensitivity(table, tmp_path / "new" / "sensitivity", threshold=90)
    assert (png, svg) == (tmp_path / "new/sensitivity.png", tmp_path / "new/sensitivity.svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    written = texts(svg)
    assert all(written.count(layer) == 1 for layer in table.layers)
    assert {"dense: 93.30 %", "threshold: 90.00 %"} <= set(written)
    assert "d_score: each layer pruned alone, no retraining (2,000 validation images)" in written

    lines = {line.get_label(): line for line in drawn[0].axes[0].get_lines()}
    for layer in table.layers:
        assert list(lines[layer].get_ydata()) == [93.3, *table.curve(layer)]
        assert list(lines[layer].get_xdata()) == pytest.approx([0, *(100 * ratio for ratio in RATIOS)])
    assert set(lines["threshold: 90.00 %"].get_ydata()) == {90}
    looks = {(line.get_color(), line.get_linestyle()) for line in map(lines.get, table.layers)}
    assert len(looks) == 27


@pytest.mark.parametrize("layers", [1, 4, 30, 75])
def test_no_label_covers_another_or_the_curves(tmp_path: Path, drawn: list[Any], layers: int) -> None:
    plot_sensitivity(falling(layers), tmp_path / "sensitivity")
    (figure,) = drawn
    (axes,) = figure.axes
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.get_legend().get_texts()]
    assert len(boxes) == layers + 1
    assert all(box.x0 > axes.get_window_extent(renderer).x1 for box in boxes)
    assert min(box.y0 for box in boxes) > 0
    labels = [
        *axes.get_xticklabels(),
        *axes.get_yticklabels(),
        axes.title,
        axes.xaxis.label,
        axes.yaxis.label,
    ]
    boxes += [label.get_window_extent(renderer) for label in labels if label.get_text()]
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[place + 1 :])


def test_the_most_sensitive_layers_have_markers(tmp_path: Path, drawn: list[Any]) -> None:
    table = falling(27)
    plot_sensitivity(table, tmp_path / "sensitivity")
    marked = {
        line.get_label(): line.get_marker()
        for line in drawn[0].axes[0].get_lines()
        if line.get_marker() != "None"
    }
    assert list(marked) == list(table.layers)[:5]
    assert len(set(marked.values())) == 5


def test_a_line_ends_where_the_layer_was_given_up(tmp_path: Path, drawn: list[Any]) -> None:
    table = falling(3)
    layers = {
        layer: {key: top1 if top1 > 60 else None for key, top1 in cells.items()}
        for layer, cells in table.layers.items()
    }
    cut = Sensitivity(93.3, 2000, RATIOS, layers, table.orders, "l1", protocol="test", early_exit=20.0)
    _, svg = plot_sensitivity(cut, tmp_path / "sensitivity")
    axes = drawn[0].axes[0]
    for line, cells in zip(axes.get_lines(), layers.values(), strict=False):
        assert len(line.get_ydata()) == 1 + sum(
            top1 is not None for top1 in cells.values()
        ) < 20 or None not in (cells.values())
    assert axes.get_ylim()[0] == 60
    assert any("test images, as in the paper" in text for text in texts(svg))


def test_the_same_table_gives_the_same_files(tmp_path: Path) -> None:
    files = [plot_sensitivity(falling(5), tmp_path / name) for name in ("one", "two")]
    for one, two in zip(*files, strict=True):
        assert one.read_bytes() == two.read_bytes()


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DScoreError, match=r'pip install "dscore-plugin\[plots\]"'):
        plot_sensitivity(falling(2), tmp_path / "sensitivity")
    assert list(tmp_path.iterdir()) == []


def test_importing_the_module_does_not_import_matplotlib() -> None:
    code = "import sys, dscore_plugin.report.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        plot_sensitivity(falling(2), tmp_path / "file" / "sensitivity")
