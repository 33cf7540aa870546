"""Runs the cells of a benchmark, one after the other, whatever happens to any of them."""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path

from dscore_plugin.analysis_runs import run_sensitivity
from dscore_plugin.bench.cells import Cell, Place
from dscore_plugin.bench.claims import alone, first_free
from dscore_plugin.bench.protocol import Protocol
from dscore_plugin.bench.records import (
    Record,
    add_records,
    failed_record,
    finished,
    finished_record,
    key,
    read_records,
)
from dscore_plugin.bench.survey import FAILED, UNFIT, Survey, seconds_left, survey
from dscore_plugin.errors import BenchError
from dscore_plugin.files import read_json, write_json, write_text
from dscore_plugin.pipeline import run_prune
from dscore_plugin.training.progress import Progress

Say = Callable[[str], None]

_RESULTS = "results"  # what the lock on the results file is called
_PATIENCE = 5.0  # seconds between two looks at what other processes are doing


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
    folder, an unfinished one continues from its last epoch. A cell that fails is recorded with its reason, the
    others go on; the next run tries it again. Several processes that share ``out`` and the work folder share the
    cells, too: each takes one that no other is measuring, and waits at the end for what hangs on the others' cells.

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
    failed_before = _failed(survey(protocol, _read(out), place).only(only))
    records = _adopt(place, out)
    tried, waiting = set[str](), False
    while True:
        now = survey(protocol, records, place).only(only)
        wanted = [entry.cell for entry in now.entries if entry.state != UNFIT] if redo else now.left
        done_with = tried | (_failed(now) - failed_before)  # another process has just failed in the same way
        cells = [cell for cell in wanted if cell.id not in done_with]
        if not cells:
            return now
        with first_free(cells, place) as cell:
            if cell is None:
                if not waiting:
                    say(f"waiting for other processes, which measure what is left: {len(cells)} cells")
                waiting = True
                time.sleep(_PATIENCE)
            elif redo or not _has_numbers(cell, place, out):  # it may have got them since the survey
                say(f"{cell.name}; cells to go: {len(cells)}, {time_left(seconds_left(cells, records))}")
                if redo:
                    _forget(cell, place)
                tried.add(cell.id)
                waiting = False
                _write(_attempt(cell, place, progress, say), cell, place, out)
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
    if place.data.partition(":")[0] != protocol.data:
        raise BenchError(f"{protocol.name} is measured on {protocol.data}; got the data {place.data!r}")
    if not place.weights.is_file():
        raise BenchError(f"{place.weights} is missing; expected the weights of {protocol.model}")
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


def _write(record: Record, cell: Cell, place: Place, out: Path) -> None:
    """Keep what a cell brought, in the work folder and among the results."""
    with alone(place, _RESULTS):
        write_json(_cell_file(cell, place), record)
        add_records(out, [record])


def _has_numbers(cell: Cell, place: Place, out: Path) -> bool:
    return any(key(record) == (cell.id, place.digest) for record in finished(_adopt(place, out)))


def _failed(found: Survey) -> set[str]:
    return {entry.cell.id for entry in found.entries if entry.state == FAILED}


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
            spent = _measure_table(cell, place, progress, say)
    job = cell.job(place)
    fresh, started = not (job.out.exists() or job.work.exists()), time.perf_counter()
    if job.out.exists():  # it was complete, but its record was not written any more
        metrics = read_json(job.out / "metrics.json")
        shutil.rmtree(job.work, ignore_errors=True)
    else:
        metrics = run_prune(job, progress, say)
    return finished_record(
        cell,
        place,
        metrics,
        test_images=len(job.source.load_images().test),
        seconds=round(time.perf_counter() - started, 1) if fresh else None,
        sensitivity_seconds=spent,
    )


def _measure_table(cell: Cell, place: Place, progress: Progress | None, say: Say) -> float | None:
    """Measure the sensitivity table of a cell unless another cell has done so; return its seconds, if known."""
    folder = cell.table_folder(place)
    note = folder.with_name(folder.name + ".seconds.json")
    if not folder.exists():
        fresh, started = not folder.with_name(folder.name + ".work").exists(), time.perf_counter()
        source = place.source(cell.protocol.model, cell.table_seed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {"seconds": None})
        run_sensitivity(source, cell.table_choice(), folder, resume=True, progress=progress, say=say)
        if fresh:
            write_json(note, {"seconds": round(time.perf_counter() - started, 1)})
    found: float | None = read_json(note)["seconds"] if note.exists() else None
    return found


def _cell_file(cell: Cell, place: Place) -> Path:
    folder = place.work / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{cell.folder(place).name}.json"


def _forget(cell: Cell, place: Place) -> None:
    job = cell.job(place)
    for folder in (job.out, job.work):
        shutil.rmtree(folder, ignore_errors=True)
