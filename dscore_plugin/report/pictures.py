"""The pictures that belong to a plan: whatever its making left to be seen."""

from __future__ import annotations

from pathlib import Path

from dscore_plugin.plan import Plan
from dscore_plugin.report.coarse_plot import plot_best_so_far
from dscore_plugin.report.drawing import can_draw
from dscore_plugin.report.energy_plot import plot_energy


def draw_pictures(plan: Plan, folder: Path, suffix: str = "") -> list[str]:
    """Draw what a plan's ``made_by`` holds, as PNG and SVG; nothing where matplotlib is not installed.

    Args:
        plan: clusters of layers are drawn as ``energy_scores``, the best of N candidates as ``candidates``.
        folder: takes the pictures.
        suffix: of their names, for plans of several stages.

    Returns:
        The names of the PNGs.
    """
    if not can_draw():
        return []
    drawn = []
    if plan.made_by.get("clusters"):
        drawn.append(plot_energy(plan, folder / f"energy_scores{suffix}"))
    if plan.made_by.get("best_so_far"):
        points = [(int(number), float(rate)) for number, rate in plan.made_by["best_so_far"]]
        label = str(plan.made_by.get("proposal", "candidates"))
        drawn.append(plot_best_so_far({label: points}, folder / f"candidates{suffix}"))
    return [png.name for png, _ in drawn]
