"""The two figures of the coarse pruning paper: what more candidates bring, and what a ratio costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dscore_plugin.report.plots import _SETTINGS, _matplotlib, _save

# black, vermilion, blue, green, purple, orange, sky blue of the palette of Okabe and Ito
_COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
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
    matplotlib = _matplotlib()
    with matplotlib.rc_context(_SETTINGS):
        figure = import_module("matplotlib.figure").Figure(figsize=(6.4, 4.2))
        axes = figure.add_subplot()
        for place, (label, points) in enumerate(curves.items()):
            axes.plot(
                *zip(*points, strict=True),
                label=label,
                color=_COLOURS[place % len(_COLOURS)],
                marker=_MARKERS[place % len(_MARKERS)],
                linestyle="-" if place < len(_COLOURS) else "--",
                markersize=4,
                **style,
            )
        axes.set_xscale(scale)
        axes.set_xlabel(across)
        axes.set_ylabel("misclassification rate (%)")
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=10)
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0)
        if scale == "log":
            last = max(number for points in curves.values() for number, _ in points)
            numbers = [n for n in _NUMBERS if n <= last]
            axes.set_xticks(numbers, [f"{n:,}" for n in numbers])
            axes.xaxis.set_minor_locator(import_module("matplotlib.ticker").NullLocator())
        return _save(figure, Path(path))
