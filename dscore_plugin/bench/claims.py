"""Several processes on one benchmark: each cell, each table and each change of the results belongs to one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dscore_plugin.bench.cells import Cell, Place


@contextmanager
def first_free(cells: Sequence[Cell], place: Place) -> Iterator[Cell | None]:
    """Take the first cell that no other process with the same work folder is measuring.

    Args:
        cells: in the order of preference.
        place: with the work folder.

    Yields:
        The cell, which is this process's own until the block is left or the process ends; None if all are taken.
    """
    for cell in cells:
        lock = _lock(place, cell.folder(place).name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            yield cell
        finally:
            lock.release()
        return
    yield None


@contextmanager
def alone(place: Place, what: str) -> Iterator[None]:
    """Wait until no other process with the same work folder does something of this name, and keep the others out."""
    with _lock(place, what):
        yield


def _lock(place: Place, name: str) -> FileLock:
    folder: Path = place.work / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{name}.lock")
