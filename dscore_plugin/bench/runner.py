"""Runs the cells of a benchmark, one after the other, whatever happens to any of them."""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from dscore_plugin.analysis_runs import run_sensitivity
from dscore_plugin.bench.cells import Cell, Place
from dscore_plugin.bench.claims import alone, first_free
from dscore_plugin.bench.protocol import Protocol
from dscore_plugin.bench.records import (
    Record,
    add_records,
    failed_record,
    finished_record,
    key,
    read_records,
)
from dscore_plugin.bench.survey import UNFIT, Survey, seconds_left, survey
from dscore_plugin.errors import ArtifactError, TrainingError
from dscore_plugin.files import read_json, write_json, write_text
from dscore_plugin.pipeline import run_prune
from dscore_plugin.training.progress import Progress

Say = Callable[[str], None]
_Result = TypeVar("_Result")

_RESULTS = "results"  # what the lock on the results file is called
_PATIENCE = 5.0  # seconds between two looks at what other processes are doing
_PLACES = ("weights", "data", "device", "table")  # of a run: they may change while it is interrupted


def run_bench(
    protocol: Protocol,
    place: Place,
    out: Path,
    *,
    only: Collection[str] = (),
    redo: bool = False,
    progress: Progress | None = None,
    say: Say = lambda _: None,
) -> Survey:
    """Run every cell that has no numbers yet, and write each one's record when it is finished.

    A run that was killed at any time goes on where it was: finished cells are read from ``out`` and from the work
    folder, an unfinished one continues from its last epoch, or starts over where it cannot be continued. A cell that
    fails is recorded with its reason, the others go on; the next run tries it again. Several processes that share
    ``out`` and the work folder share the cells, too: each takes one that no other is measuring or has measured
    since this run began, and waits at the end for what hangs on the others' cells.

    Args:
        protocol: what to run.
        place: where the network, the images and the work folder are.
        out: the results file, a list of records; cells that it has are not repeated.
        only: names of rows or criteria; none stands for all.
        redo: measure cells again that are finished.
        progress: shows bars.
        say: takes a line of news now and then.

    Returns:
        How every cell stands afterwards.

    Raises:
        DScoreError: on bad input, before any work starts.
    """
    _check(protocol, place)
    survey(protocol, _read(out), place).only(only)
    before, waiting = _stamps(place), False
    records = _adopt(place, out)
    while True:
        now, stamps = survey(protocol, records, place).only(only), _stamps(place)
        wanted = [entry.cell for entry in now.entries if entry.state != UNFIT] if redo else now.left
        names = [_cell_file(cell, place).name for cell in wanted]
        cells = [c for c, name in zip(wanted, names, strict=True) if stamps.get(name) == before.get(name)]
        if not cells:
            return now
        with first_free(cells, place) as cell:
            if cell is None:
                if not waiting:
                    say(f"waiting for other processes, which measure what is left: {len(cells)} cells")
                waiting = True
                time.sleep(_PATIENCE)
            elif _stamps(place) == stamps:  # else it may have been measured since the survey
                say(f"{cell.name}; cells to go: {len(cells)}, {time_left(seconds_left(cells, records))}")
                if redo:
                    _forget(cell, place)
                waiting = False
                keep(_attempt(cell, place, progress, say), cell, place, out)
        records = _adopt(place, out)


def time_left(seconds: float | None) -> str:
    """Put an estimate into words."""
    if seconds is None:
        return "time unknown until one is finished"
    if seconds < 60:
        return "less than a minute"
    minutes = round(seconds / 60)
    return f"about {minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"about {minutes} min"


def _check(protocol: Protocol, place: Place) -> None:
    """Refuse what would make every cell fail."""
    place.check(protocol)
    seed = protocol.blocks[0].seeds[0]
    source = place.source(protocol.model, seed)
    source.build(source.load_images())


def _adopt(place: Place, out: Path) -> list[Record]:
    """Read the results, and add what was finished in the work folder but did not get there."""
    with alone(place, _RESULTS):
        files = sorted((place.work / "cells").glob("*.json"))
        before = {key(entry) for entry in _read(out)}
        found = [entry for entry in map(read_json, files) if key(entry) not in before]
        if found:
            add_records(out, found)
        return _read(out)


def _read(out: Path) -> list[Record]:
    return read_records(out) if out.exists() else []


def keep(record: Record, cell: Cell, place: Place, out: Path) -> None:
    """Keep what a cell brought, in the work folder and among the results."""
    with alone(place, _RESULTS):
        write_json(_cell_file(cell, place), record)
        add_records(out, [record])


def _stamps(place: Place) -> dict[str, tuple[int, int]]:
    """Return for every cell that was measured in this work folder what changes when any process measures it again."""
    found = [(file.name, file.stat()) for file in (place.work / "cells").glob("*.json")]
    return {name: (state.st_ino, state.st_mtime_ns) for name, state in found}


def _attempt(cell: Cell, place: Place, progress: Progress | None, say: Say) -> Record:
    """Run a cell; what goes wrong becomes its record."""
    try:
        return _run(cell, place, progress, say)
    except Exception as error:  # whatever it is, the other cells can do without this one
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        note = place.work / "failed" / f"{cell.name}-{cell.id}.txt"
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, traceback.format_exc())
        say(f"{cell.name} failed: {reason} ({note})")
        return failed_record(cell, place, reason)


def _run(cell: Cell, place: Place, progress: Progress | None, say: Say) -> Record:
    """Measure a cell, or read what an interrupted run had finished of it."""
    spent = None
    if cell.shares_table:
        with alone(place, cell.table_folder(place).name):
            spent = measure_table(cell, place, progress, say)
    job = cell.job(place)
    fresh, started = not (job.out.exists() or job.work.exists()), time.perf_counter()
    if job.out.exists():  # it was complete, but its record was not written any more
        metrics = read_json(job.out / "metrics.json")
        shutil.rmtree(job.work, ignore_errors=True)
    else:
        metrics = _go_on(job.work, job.identity(), lambda: run_prune(job, progress, say), say)
    return finished_record(
        cell,
        place,
        metrics,
        test_images=len(job.source.load_images().test),
        seconds=round(time.perf_counter() - started, 1) if fresh else None,
        sensitivity_seconds=spent,
    )


def measure_table(cell: Cell, place: Place, progress: Progress | None, say: Say) -> float | None:
    """Measure the sensitivity table of a cell unless another cell has done so; return its seconds, if known."""
    folder = cell.table_folder(place)
    note, work = folder.with_name(folder.name + ".seconds.json"), folder.with_name(folder.name + ".work")
    if not folder.exists():
        fresh, started = not work.exists(), time.perf_counter()
        source, choice = place.source(cell.protocol.model, cell.table_seed), cell.table_choice()
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {"seconds": None})
        _go_on(
            work,
            {"source": asdict(source), "choice": asdict(choice)},
            lambda: run_sensitivity(source, choice, folder, resume=True, progress=progress, say=say),
            say,
        )
        if fresh:
            write_json(note, {"seconds": round(time.perf_counter() - started, 1)})
    found: float | None = read_json(note)["seconds"] if note.exists() else None
    return found


def _go_on(work: Path, identity: Mapping[str, Any], run: Callable[[], _Result], say: Say) -> _Result:
    """Run what may have been interrupted; start over where that cannot be continued.

    The names of work folders hold the cell and the weights: what lies there is the same run, begun by this version or
    another one, with its files here or elsewhere, on this hardware or other.
    """
    begun = work.exists()
    try:
        _relocate(work / "job.json", identity)
        return run()
    except (ArtifactError, TrainingError) as error:
        disk_failed = isinstance(error.__cause__, OSError)  # no reason to lose what is there
        if not begun or disk_failed:
            raise
        say(f"{work.stem} cannot be continued: {str(error).partition(';')[0]}; starting over")
    shutil.rmtree(work, ignore_errors=True)
    return run()


def _relocate(note: Path, identity: Mapping[str, Any]) -> None:
    """Write the present places into the note of an interrupted run."""
    if note.exists():
        write_json(note, _with_places(read_json(note), identity))


def _with_places(before: Any, now: Any) -> Any:
    if isinstance(before, dict) and isinstance(now, Mapping):
        return {
            name: now.get(name) if name in _PLACES else _with_places(value, now.get(name))
            for name, value in before.items()
        }
    if isinstance(before, list) and isinstance(now, (list, tuple)) and len(before) == len(now):
        return [_with_places(*pair) for pair in zip(before, now, strict=True)]
    return before


def _cell_file(cell: Cell, place: Place) -> Path:
    folder = place.work / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{cell.folder(place).name}.json"


def _forget(cell: Cell, place: Place) -> None:
    job = cell.job(place)
    for folder in (job.out, job.work):
        shutil.rmtree(folder, ignore_errors=True)
