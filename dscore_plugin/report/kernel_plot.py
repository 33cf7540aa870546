"""The two figures of kernel pruning: what a sparsity costs in accuracy, and what it gains in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dscore_plugin.report.drawing import COLOURS, MARKERS, drawing_context, new_figure, save_figure, tidy


def plot_kernels(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    *,
    across: str,
    title: str = "",
    level: tuple[str, float] | None = None,
    dashed: Sequence[str] = (),
) -> tuple[Path, Path]:
    """Draw a quantity over the share of removed kernels, one line for each label.

    Args:
        curves: for each label the points ``(sparsity, value)``, sparsity in (0, 1).
        path: of the pictures, without ending; ``.png`` and ``.svg`` are appended.
        across: what the values are, for the vertical axis.
        title: above the picture.
        level: label and value of a horizontal line, such as the dense network's.
        dashed: labels whose lines are dashed; each takes the colour of the line that lies as many places before it as
            there are undashed ones.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        DScoreError: if matplotlib is not installed.
        ArtifactError: if the pictures cannot be written.
    """
    solid = max(1, len(curves) - len(dashed))
    with drawing_context():
        figure = new_figure(6.4, 4.2)
        axes = figure.add_subplot()
        for place, (label, points) in enumerate(curves.items()):
            colour = place % solid if dashed else place
            axes.plot(
                [100 * sparsity for sparsity, _ in points],
                [value for _, value in points],
                label=label,
                color=COLOURS[colour % len(COLOURS)],
                marker=MARKERS[colour % len(MARKERS)],
                linestyle="--" if label in dashed else "-",
                markersize=4,
            )
        if level is not None:
            axes.axhline(level[1], color="0.5", linewidth=0.8, label=level[0])
        axes.set_xlabel("kernels removed (%)")
        axes.set_ylabel(across)
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=10)
        tidy(axes)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0)
        return save_figure(figure, Path(path))
