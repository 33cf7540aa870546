from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from dscore_plugin.errors import ArtifactError
from dscore_plugin.report import coarse_plot
from dscore_plugin.report.coarse_plot import plot_best_so_far, plot_mcr


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    figures: list[Any] = []
    save = coarse_plot.save_figure
    monkeypatch.setattr(
        coarse_plot, "save_figure", lambda figure, path: figures.append(figure) or save(figure, path)
    )
    return figures


def texts(svg: Path) -> set[str]:
    return {"".join(n.itertext()) for n in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")}


def test_the_best_so_far(tmp_path: Path, drawn: list[Any]) -> None:
    curves = {"20 %": [[1, 60.0], [7, 41.5], [200, 41.5]], "60 %": [(1, 90.0), (150, 85.0), (200, 85.0)]}
    png, svg = plot_best_so_far(curves, tmp_path / "new" / "best", title="ResNet-20")
    assert png.read_bytes().startswith(b"\x89PNG")
    lines = drawn[0].axes[0].get_lines()
    assert [list(map(list, zip(*line.get_data(), strict=True))) for line in lines] == [
        [list(point) for point in points] for points in curves.values()
    ]
    assert {line.get_drawstyle() for line in lines} == {"steps-post"}
    assert {"20 %", "60 %", "ResNet-20", "candidates (N)", "1", "50", "200"} <= texts(svg)


def test_misclassification_over_the_ratio(tmp_path: Path, drawn: list[Any]) -> None:
    _, svg = plot_mcr({"L1": [(0.2, 12.5), (0.4, 55.0)]}, tmp_path / "mcr", removed="kernels")
    (line,) = drawn[0].axes[0].get_lines()
    assert line.get_xdata().tolist() == pytest.approx([20, 40])
    assert line.get_ydata().tolist() == [12.5, 55.0]
    assert {"L1", "kernels removed from each layer (%)", "misclassification rate (%)"} <= texts(svg)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        plot_mcr({"L1": [(0.2, 12.5)]}, tmp_path / "file" / "mcr")
