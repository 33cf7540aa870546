"""The two figures of a comparison of criteria: bars with their spread, and accuracy over MACs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dscore_plugin.report.drawing import (
    BLUE,
    COLOURS,
    MARKERS,
    VERMILION,
    drawing_context,
    new_figure,
    save_figure,
    tidy,
)

_LOOKS = {  # the later the stage, the darker the bar
    "pruned": ("right after the removal", "#c6dbef"),
    "recalibrated": ("batch norm recalibrated", "#6baed6"),
    "finetuned": ("fine-tuned", "#08519c"),
}
_DASHES = ("-", "--", ":")
Curves = Mapping[str, Sequence[tuple[float, Sequence[float]]]]


@dataclass(frozen=True)
class Bar:
    """One row of bars.

    Attributes:
        label: beside it.
        top1: for each stage (``pruned``, ``recalibrated``, ``finetuned``) the percentages of all seeds; may be empty.
    """

    label: str
    top1: Mapping[str, Sequence[float]]


def plot_bars(bars: Sequence[Bar], path: str | Path, *, dense: float, title: str = "") -> tuple[Path, Path]:
    """Draw top-1 after each stage, one row for each criterion, and beside it the last stage on a finer scale.

    Bars end at the mean over the seeds; lines go from the lowest to the highest.

    Args:
        bars: from top to bottom.
        path: of the pictures, without ending; ``.png`` and ``.svg`` are appended.
        dense: top-1 of the dense network in percent, drawn as a line.
        title: above the picture.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        DScoreError: if matplotlib is not installed.
        ArtifactError: if the pictures cannot be written.
    """
    with drawing_context():
        height = 1.6 + 0.42 * len(bars)
        figure = new_figure(9.2, height)
        whole, close = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _draw_stages(whole, bars)
        _draw_finetuned(close, bars)
        for axes in (whole, close):
            label = f"dense: {dense:.2f} %"
            axes.axvline(dense, color=VERMILION, linewidth=1.2, linestyle=(0, (6, 3)), label=label)
            tidy(axes, axis="x")
        whole.set_yticks(range(len(bars)), [bar.label for bar in bars])
        whole.set_ylim(len(bars) - 0.4, -0.6)
        whole.set_xlim(0, 100)
        whole.set_xlabel("top-1 accuracy (%)")
        close.set_xlabel("fine-tuned only, enlarged (%)")
        close.tick_params(axis="y", length=0)
        figure.suptitle(title, fontsize=10, y=1 - 0.08 / height, va="top")
        looks = whole.get_legend_handles_labels()
        above = {"loc": "upper center", "bbox_to_anchor": (0.5, 1 - 0.3 / height)}
        figure.legend(*looks, frameon=False, fontsize=8, ncols=len(looks[1]), **above)
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / height))
        return save_figure(figure, Path(path))


def plot_over_macs(
    curves: Mapping[str, Curves], path: str | Path, *, dense: float, title: str = ""
) -> tuple[Path, Path]:
    """Draw fine-tuned top-1 over the MACs that are left, one panel for each allocation, one line for each criterion.

    Args:
        curves: for each allocation and label the points: share of the MACs in (0, 1), and the percentages of all
            seeds. A line joins the means; bars go from the lowest to the highest.
        path: of the pictures, without ending; ``.png`` and ``.svg`` are appended.
        dense: top-1 of the dense network in percent, drawn as a line.
        title: above the picture.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        DScoreError: if matplotlib is not installed.
        ArtifactError: if the pictures cannot be written.
    """
    labels = list(dict.fromkeys(label for panel in curves.values() for label in panel))
    with drawing_context():
        figure = new_figure(1.9 + 4.4 * len(curves), 4.6)
        panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
        shown: dict[str, Any] = {}
        for axes, (allocation, panel) in zip(panels, curves.items(), strict=True):
            for label, points in panel.items():
                shown[label] = _draw_curve(axes, points, label, labels.index(label))
            shown["dense"] = axes.axhline(dense, color="0.35", linewidth=1, linestyle=(0, (8, 3)))
            axes.set_title(f"allocation: {allocation}", fontsize=9)
            axes.set_xlabel("MACs kept (%)")
            tidy(axes)
        panels[0].set_ylabel("top-1 accuracy after fine-tuning (%)")
        handles = [shown[label] for label in (*labels, "dense")]
        panels[-1].legend(
            handles, [*labels, f"dense: {dense:.2f} %"], frameon=False, fontsize=8, loc="upper left",
            bbox_to_anchor=(1.02, 1.0), borderaxespad=0,
        )  # fmt: skip
        figure.suptitle(title, fontsize=10)
        figure.tight_layout()
        return save_figure(figure, Path(path))


def _draw_stages(axes: Any, bars: Sequence[Bar]) -> None:
    """Draw thin bars side by side, the first stage on top."""
    height = 0.8 / len(_LOOKS)
    for number, (stage, (label, colour)) in enumerate(_LOOKS.items()):
        found = [(place, bar.top1[stage]) for place, bar in enumerate(bars) if bar.top1.get(stage)]
        if not found:
            continue
        places = [place + (number - 1) * height for place, _ in found]
        means, errors = _ends([tops for _, tops in found])
        axes.barh(places, means, height, color=colour, label=label)
        axes.errorbar(means, places, xerr=errors, fmt="none", ecolor="0.15", elinewidth=0.9)


def _draw_finetuned(axes: Any, bars: Sequence[Bar]) -> None:
    found = [(place, bar.top1["finetuned"]) for place, bar in enumerate(bars) if bar.top1.get("finetuned")]
    if found:
        means, errors = _ends([tops for _, tops in found])
        axes.errorbar(
            means, [place for place, _ in found], xerr=errors, fmt="o", color=BLUE, markersize=4.5, elinewidth=1.4,
            capsize=2.5,
        )  # fmt: skip


def _draw_curve(axes: Any, points: Sequence[tuple[float, Sequence[float]]], label: str, number: int) -> Any:
    ordered = sorted(points)
    means, errors = _ends([tops for _, tops in ordered])
    return axes.errorbar(
        [100 * share for share, _ in ordered], means, yerr=errors, label=label, markersize=4, elinewidth=0.9,
        capsize=2, linewidth=1.2, color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)],
        linestyle=_DASHES[number // len(COLOURS) % len(_DASHES)],
    )  # fmt: skip


def _ends(found: Sequence[Sequence[float]]) -> tuple[list[float], list[list[float]]]:
    """Return means, and how far the lowest lies below and the highest above."""
    means = [statistics.mean(tops) for tops in found]
    below = [mean - min(tops) for mean, tops in zip(means, found, strict=True)]
    above = [max(tops) - mean for mean, tops in zip(means, found, strict=True)]
    return means, [below, above]
