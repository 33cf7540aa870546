"""Pictures of results, as PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dscore_plugin.criteria.dependency_aware import TRAINING_THRESHOLD
from dscore_plugin.report.drawing import (
    BLUE,
    MARKERS,
    VERMILION,
    drawing_context,
    new_figure,
    save_figure,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dscore_plugin.selection.sensitivity import Sensitivity

_STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1)))  # neighbours in depth have similar colours: their dashes differ
_MARKED = 5  # layers, the most sensitive
_LEGEND_ROWS = 34


def plot_sensitivity(
    sensitivity: Sensitivity, path: str | Path, *, threshold: float | None = None
) -> tuple[Path, Path]:
    """Draw accuracy over pruning ratio, one line for each layer, as in Figure 2 of the D-Score paper.

    Colours go from dark (near the input) to light; the five most sensitive layers have markers. A line that ends
    early belongs to a layer that an early exit gave up.

    Args:
        sensitivity: the table.
        path: of the pictures, without ending; ``.png`` and ``.svg`` are appended.
        threshold: top-1 in percent, drawn as a line.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        DScoreError: if matplotlib is not installed.
        ArtifactError: if the pictures cannot be written.
    """
    with drawing_context() as matplotlib:
        columns = math.ceil((len(sensitivity.layers) + 2) / _LEGEND_ROWS)
        figure = new_figure(6.5 + 1.7 * columns, 6.2)
        axes = figure.add_axes((0.08, 0.09, 5.7 / (6.5 + 1.7 * columns), 0.84))
        _draw_layers(axes, sensitivity, matplotlib.colormaps["viridis"])
        _draw_lines(axes, sensitivity, threshold)
        _label(axes, sensitivity, columns)
        return save_figure(figure, Path(path))


def plot_sparsity(
    rows: Sequence[Mapping[str, float]], path: str | Path, *, threshold: float = TRAINING_THRESHOLD
) -> tuple[Path, Path]:
    """Draw how a sparsity training steered itself: the sparsity against its target, and lambda below it.

    Args:
        rows: for each epoch ``lambda``, ``sparsity`` after it and ``target``.
        path: of the pictures, without ending; ``.png`` and ``.svg`` are appended.
        threshold: below which a channel counted as near zero, relative to its layer's maximum.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        DScoreError: if matplotlib is not installed.
        ArtifactError: if the pictures cannot be written.
    """
    with drawing_context():
        figure = new_figure(6.4, 4.6)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        epochs = range(1, len(rows) + 1)
        marker = "o" if len(rows) <= 40 else None
        shares = [100 * row["sparsity"] for row in rows]
        above.plot(epochs, shares, color=BLUE, marker=marker, markersize=4, label="sparsity", clip_on=False)
        above.plot(
            epochs,
            [100 * row["target"] for row in rows],
            color=VERMILION,
            linestyle=(0, (6, 3)),
            label="target",
        )
        above.set_title("sparsity training that steers itself", fontsize=10)
        above.set_ylabel(f"channels below {threshold:g}\nof their layer's maximum (%)")
        above.set_ylim(0, 100)
        above.legend(frameon=False)
        below.step(epochs, [row["lambda"] for row in rows], where="mid", color=BLUE)
        below.set_ylabel("lambda of the epoch")
        below.set_ylim(bottom=0)
        below.set_xlabel("epoch")
        below.xaxis.get_major_locator().set_params(integer=True)
        for axes in (above, below):
            tidy(axes)
        return save_figure(figure, Path(path))


def _draw_layers(axes: Axes, sensitivity: Sensitivity, colours: Any) -> None:
    layers = list(sensitivity.layers)
    markers = dict(zip(_most_sensitive(sensitivity), MARKERS[:_MARKED], strict=False))
    for depth, layer in enumerate(layers):
        measured = [
            (100 * ratio, top1)
            for ratio, top1 in zip(sensitivity.ratios, sensitivity.curve(layer), strict=True)
            if top1 is not None
        ]
        axes.plot(
            *zip((0.0, sensitivity.dense_top1), *measured, strict=True),
            color=colours(0.9 * depth / max(1, len(layers) - 1)),  # the brightest tenth is too pale on white
            linestyle=_STYLES[depth % len(_STYLES)],
            linewidth=1.8 if layer in markers else 1.1,
            marker=markers.get(layer),
            markersize=4.5,
            label=layer,
            zorder=3 if layer in markers else 2,
        )


def _most_sensitive(sensitivity: Sensitivity) -> list[str]:
    """Return the layers, the one with the lowest mean accuracy first; what was left out counts as 0."""
    means = {layer: sum(top1 or 0 for top1 in sensitivity.curve(layer)) for layer in sensitivity.layers}
    return sorted(means, key=lambda layer: means[layer])


def _draw_lines(axes: Axes, sensitivity: Sensitivity, threshold: float | None) -> None:
    dense = sensitivity.dense_top1
    axes.axhline(
        dense, color="0.35", linestyle=(0, (8, 3)), linewidth=1, label=f"dense: {dense:.2f} %", zorder=1
    )
    if threshold is not None:
        label = f"threshold: {threshold:.2f} %"
        axes.axhline(threshold, color=VERMILION, linewidth=1.4, label=label, zorder=1)


def _label(axes: Axes, sensitivity: Sensitivity, columns: int) -> None:
    kind = "test images, as in the paper" if sensitivity.protocol == "test" else "validation images"
    name = f"{sensitivity.criterion}: " if sensitivity.criterion else ""
    axes.set_title(
        f"{name}each layer pruned alone, no retraining ({sensitivity.images:,} {kind})", fontsize=10
    )
    axes.set_xlabel("channels removed (%)")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 10))
    axes.set_ylim(_bottom(sensitivity), 101)
    tidy(axes)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        borderaxespad=0,
        ncols=columns,
        fontsize=7.5,
        frameon=False,
        handlelength=3.2,
        labelspacing=0.35,
    )


def _bottom(sensitivity: Sensitivity) -> float:
    """Return where the axis begins: at 0, or near the lowest point where half the axis would stay empty."""
    every = (top1 for layer in sensitivity.layers for top1 in sensitivity.curve(layer) if top1 is not None)
    lowest = min(every, default=0.0)
    return 10 * (lowest // 10) if lowest >= 50 else 0.0
