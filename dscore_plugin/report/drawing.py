"""What all pictures share: matplotlib where it is installed, its settings, colours that tell apart, and saving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dscore_plugin.errors import ArtifactError, DScoreError

# black, vermilion, blue, green, purple, orange, sky blue of the palette of Okabe and Ito
COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
VERMILION, BLUE = COLOURS[1:3]
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "dscore-plugin", "font.size": 9}


def can_draw() -> bool:
    """Say whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


@contextmanager
def drawing_context() -> Iterator[Any]:
    """Give matplotlib, with the settings of all pictures for as long as the context lasts.

    Raises:
        DScoreError: if matplotlib is not installed.
    """
    try:
        matplotlib = import_module("matplotlib")
    except ImportError as error:
        raise DScoreError(
            'plots need matplotlib, which is not installed; run: pip install "dscore-plugin[plots]"'
        ) from error
    with matplotlib.rc_context(_SETTINGS):
        yield matplotlib


def new_figure(width: float, height: float) -> Any:
    """Give an empty figure of so many inches; it belongs to no window."""
    return import_module("matplotlib.figure").Figure(figsize=(width, height))


def tidy(axes: Any, **grid: Any) -> None:
    """Draw a faint grid behind the data, and no frame above and on the right.

    Args:
        axes: to be tidied.
        **grid: further arguments of the grid, such as ``axis="y"``.
    """
    axes.grid(color="0.9", linewidth=0.6, **grid)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Any, path: Path) -> tuple[Path, Path]:
    """Write a figure as PNG and SVG; the same figure gives the same files.

    Args:
        figure: of matplotlib.
        path: without ending; ``.png`` and ``.svg`` are appended.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        ArtifactError: if they cannot be written.
    """
    png, svg = (path.with_name(path.name + ending) for ending in (".png", ".svg"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png, dpi=160, bbox_inches="tight")
        figure.savefig(svg, bbox_inches="tight", metadata={"Date": None})
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror}") from error
    return png, svg
