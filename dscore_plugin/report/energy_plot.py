"""A picture of the branches' energy scores and of the clusters they form, as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dscore_plugin.errors import PlanError
from dscore_plugin.plan import LayerRemoval, LayerRow, Plan
from dscore_plugin.report.drawing import drawing_context, new_figure, save_figure, tidy

_COLOURS = 10  # of the palette; neighbouring clusters differ, and clusters lie side by side on the score axis


def plot_energy(plan: Plan, path: str | Path) -> tuple[Path, Path]:
    """Draw the score of every branch over its depth: a colour for each cluster, filled where the branch stays.

    Args:
        plan: of the criterion ``energy``, with scores.
        path: of the pictures, without ending; ``.png`` and ``.svg`` are appended.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        PlanError: if the plan removes no layers, or has no scores (``choice="random"`` looks at no image).
        DScoreError: if matplotlib is not installed.
        ArtifactError: if the pictures cannot be written.
    """
    rows = [row for row in plan.rows if row.type == LayerRemoval.type]
    clusters = plan.made_by.get("clusters")
    if not rows or any(row.score_max is None for row in rows) or clusters is None:
        raise PlanError("the plan has no energy scores of layers; make one with the criterion energy")
    if len(clusters) != len(rows):
        raise PlanError(f"the plan has {len(rows)} layers but clusters of {len(clusters)}; make a new plan")
    with drawing_context() as matplotlib:
        figure = new_figure(max(6.4, 0.24 * len(rows) + 1.5), 4.4)
        axes = figure.subplots()
        _draw(axes, plan, rows, list(clusters), matplotlib.colormaps["tab10"])
        _label(axes, plan, rows)
        return save_figure(figure, Path(path))


def _draw(axes: Any, plan: Plan, rows: list[LayerRow], clusters: list[int], colours: Any) -> None:
    bottom = _scale(axes, [float(row.score_max or 0) for row in rows])
    for place, (row, cluster) in enumerate(zip(rows, clusters, strict=True)):
        colour = colours(cluster % _COLOURS)
        stays = not plan.removed(row.layer)
        axes.vlines(place, bottom, row.score_max, color=colour, linewidth=0.8, alpha=0.5, zorder=1)
        axes.plot(
            place, row.score_max, "o", markersize=6.5, markeredgecolor=colour,
            markerfacecolor=colour if stays else "white", zorder=2,
        )  # fmt: skip
        axes.annotate(
            str(cluster + 1), (place, row.score_max), xytext=(0, 6), textcoords="offset points",
            ha="center", fontsize=6.5, color="0.3",
        )  # fmt: skip


def _scale(axes: Any, scores: list[float]) -> float:
    """Choose a logarithmic axis where the scores span more than a power of ten; return where it begins."""
    lowest, highest = min(scores), max(scores)
    if lowest > 0 and highest > 10 * lowest:
        axes.set_yscale("log")
        axes.set_ylim(lowest / 1.5, highest * 1.5)
        return lowest / 1.5
    axes.axhline(0, color="0.35", linewidth=0.8)
    return 0.0


def _label(axes: Any, plan: Plan, rows: list[LayerRow]) -> None:
    kept = sum(not plan.removed(row.layer) for row in rows)
    axes.set_title(
        f"energy scores in {len(set(plan.made_by['clusters']))} clusters (numbered); "
        f"{kept} of {len(rows)} branches stay (filled)",
        fontsize=10,
    )
    axes.set_xticks(range(len(rows)), [row.layer for row in rows], rotation=90, fontsize=7)
    scaled = " / sqrt(elements)" if plan.made_by.get("standardize") else ""
    axes.set_ylabel(f"{plan.made_by.get('measure', 'energy')} of the feature map{scaled}")
    axes.margins(x=0.02)
    tidy(axes, axis="y")
