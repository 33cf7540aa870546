"""The two figures of the coarse pruning paper: what more candidates bring, and what a ratio costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dscore_plugin.report.drawing import COLOURS, MARKERS, drawing_context, new_figure, save_figure, tidy

_NUMBERS = tuple(digit * 10**power for power in range(5) for digit in (1, 2, 5))
Points = Sequence[tuple[float, float]]


def plot_best_so_far(curves: Mapping[str, Points], path: str | Path, *, title: str = "") -> tuple[Path, Path]:
    """Draw the lowest misclassification rate over the number of candidates, as in the paper's Figure 2a.

    Args:
        curves: for each label the points ``(candidates, percent)`` at which the rate falls, and the last one; the
            rate stays in between (``best_so_far`` in a plan's ``made_by``).
        path: of the pictures, without ending; ``.png`` and ``.svg`` are appended.
        title: above the picture.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        DScoreError: if matplotlib is not installed.
        ArtifactError: if the pictures cannot be written.
    """
    return _draw(curves, path, title, "candidates (N)", "log", drawstyle="steps-post")


def plot_mcr(
    curves: Mapping[str, Points], path: str | Path, *, title: str = "", removed: str = "channels"
) -> tuple[Path, Path]:
    """Draw misclassification over the pruning ratio, one line for each way of choosing, as in the paper's Figure 3.

    Args:
        curves: for each label the points ``(ratio, percent)``.
        path: of the pictures, without ending; ``.png`` and ``.svg`` are appended.
        title: above the picture.
        removed: what the ratio is a share of.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        DScoreError: if matplotlib is not installed.
        ArtifactError: if the pictures cannot be written.
    """
    percent = {label: [(100 * ratio, rate) for ratio, rate in points] for label, points in curves.items()}
    return _draw(percent, path, title, f"{removed} removed from each layer (%)", "linear")


def _draw(
    curves: Mapping[str, Points], path: str | Path, title: str, across: str, scale: str, **style: Any
) -> tuple[Path, Path]:
    with drawing_context():
        figure = new_figure(6.4, 4.2)
        axes = figure.add_subplot()
        for place, (label, points) in enumerate(curves.items()):
            axes.plot(
                *zip(*points, strict=True),
                label=label,
                color=COLOURS[place % len(COLOURS)],
                marker=MARKERS[place % len(MARKERS)],
                linestyle="-" if place < len(COLOURS) else "--",
                markersize=4,
                **style,
            )
        axes.set_xscale(scale)
        axes.set_xlabel(across)
        axes.set_ylabel("misclassification rate (%)")
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=10)
        tidy(axes)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0)
        if scale == "log":
            last = max(number for points in curves.values() for number, _ in points)
            numbers = [n for n in _NUMBERS if n <= last]
            axes.set_xticks(numbers, [f"{n:,}" for n in numbers])
            axes.xaxis.set_minor_locator(import_module("matplotlib.ticker").NullLocator())
        return save_figure(figure, Path(path))
