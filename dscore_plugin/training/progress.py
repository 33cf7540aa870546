"""Progress bars with a remaining time, for any long loop.

    with progress.task("scoring", total=len(batches)) as advance:
        for batch in batches:
            advance(1, loss=update(batch))

Bars go to stderr and only to a terminal, so that stdout stays free for results.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich import progress as bars
from rich.console import Console


class Advance(Protocol):
    """Moves one bar on, and shows numbers beside it."""

    def __call__(self, steps: int = 1, **numbers: float) -> None:
        """Move on by ``steps``; ``numbers`` replace those shown before."""
        ...


class Progress(Protocol):
    """Whatever can show how far a loop is."""

    def task(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Show a loop of ``total`` steps for as long as the context lasts; tasks may be nested."""
        ...


class NoProgress:
    """Shows nothing."""

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        """Give an ``advance`` that does nothing."""
        yield _ignore


class RichProgress:
    """Bars on stderr; a task inside a task gets a bar of its own below.

    Args:
        quiet: show nothing.
        console: where to draw; stderr by default. Nothing is drawn where it is no terminal.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._shown = self._console.is_terminal and not quiet
        self._open: list[bars.TaskID] = []
        self._bars: bars.Progress | None = None

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        """Show a loop of ``total`` steps for as long as the context lasts."""
        if not self._shown:
            yield _ignore
            return
        if self._bars is None:
            self._bars = _new_bars(self._console)
            self._bars.start()
        drawn = self._bars
        this = drawn.add_task(name, total=total, numbers="")
        self._open.append(this)

        def advance(steps: int = 1, **numbers: float) -> None:
            drawn.advance(this, steps)
            if numbers:
                drawn.update(this, numbers=_text(numbers))

        try:
            yield advance
        finally:
            self._close(this)

    def _close(self, task: bars.TaskID) -> None:
        assert self._bars is not None
        self._open.remove(task)
        if self._open:
            self._bars.remove_task(task)
        else:  # the outermost bar stays on the screen as it ended
            self._bars.stop()
            self._bars = None


def _ignore(steps: int = 1, **numbers: float) -> None:
    pass


def _text(numbers: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def _new_bars(console: Console) -> bars.Progress:
    return bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[numbers]}"),
        console=console,
        refresh_per_second=4,
    )
