"""What a protocol asks for, beside what is there already: cells that are done, to do, impossible, or not known yet."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dscore_plugin.bench.cells import Cell, Place
from dscore_plugin.bench.protocol import Best, Block, Protocol
from dscore_plugin.bench.ranking import best_rows
from dscore_plugin.bench.records import Record, finished, of_weights, read_records
from dscore_plugin.errors import BenchError, DScoreError, did_you_mean

DONE, FAILED, STARTED, TO_DO, UNFIT = "done", "failed", "started", "to do", "does not apply"


@dataclass(frozen=True)
class Entry:
    """One cell and how it stands.

    Attributes:
        cell: which one.
        state: ``"done"``, ``"failed"``, ``"started"``, ``"to do"`` or ``"does not apply"``.
        reason: why it failed or does not apply.
    """

    cell: Cell
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Survey:
    """All cells of a protocol.

    Attributes:
        entries: in the order in which they run.
        waiting: for each row that cannot be named yet, what it waits for.
    """

    entries: tuple[Entry, ...]
    waiting: tuple[str, ...] = ()

    @property
    def left(self) -> list[Cell]:
        """The cells that would run now; failed ones are tried again."""
        return [entry.cell for entry in self.entries if entry.state in (FAILED, STARTED, TO_DO)]

    def missing(self) -> list[str]:
        """Say for everything without numbers which it is and why."""
        words = {STARTED: "not run to its end", TO_DO: "not run"}
        lines = [
            f"{entry.cell.name}: {words.get(entry.state, entry.state)}"
            + (f": {entry.reason}" if entry.reason else "")
            for entry in self.entries
            if entry.state != DONE
        ]
        return [*lines, *(f"{line} (not run)" for line in self.waiting)]

    def only(self, criteria: Collection[str]) -> Survey:
        """Return the part that belongs to some rows or criteria; all of it if none are named.

        Raises:
            BenchError: if a name occurs in no cell.
        """
        names = {name for entry in self.entries for name in (entry.cell.row, entry.cell.info.name)}
        for name in criteria:
            if name not in names:
                raise BenchError(f"--only {name!r} names no row of this protocol{did_you_mean(name, names)}")
        kept = [e for e in self.entries if not criteria or {e.cell.row, e.cell.info.name} & set(criteria)]
        return replace(self, entries=tuple(kept))


def survey(protocol: Protocol, records: Sequence[Record], place: Place | None = None) -> Survey:
    """Compare a protocol with records.

    Args:
        protocol: what is asked for.
        records: of a results file.
        place: with weights and work folder; without it, cells count as done with whatever weights they began.
    """
    known = of_weights(records, place.digest if place else None)
    entries: dict[str, Entry] = {}
    of_block: dict[str, list[Entry]] = {}
    waiting = []
    for block in protocol.blocks:
        found = of_block.setdefault(block.name, [])
        rows, news = _rows(protocol, block, of_block, known)
        waiting += news
        for cell in cells_of(protocol, block, rows):
            entry = entries.setdefault(cell.id, _entry(cell, known.get(cell.id), place))
            found.append(entry)
    return Survey(tuple(entries.values()), tuple(waiting))


def cells_of(protocol: Protocol, block: Block, rows: Sequence[str]) -> list[Cell]:
    """Return the cells of a block for these rows; one seed after the other, as the images change with it."""
    return [
        Cell(protocol, block, row, allocation, target, seed)
        for seed in block.seeds
        for target in block.target_macs
        for row in rows
        for allocation in block.allocations
    ]


def seconds_left(cells: Sequence[Cell], records: Sequence[Record]) -> float | None:
    """Estimate how long cells take, from finished ones of the same network and hardware as the last of them.

    Args:
        cells: that are to run.
        records: of cells that ran.

    Returns:
        Seconds: for each cell its epochs times the median time of an epoch, all other work included; None if no
        finished cell tells.
    """
    timed = [record for record in finished(records) if record.get("seconds")]
    models = {cell.protocol.model for cell in cells}
    timed = [record for record in timed if record["model"] in models]
    if not timed:
        return None if cells else 0.0
    same = [record for record in timed if record["hardware"] == timed[-1]["hardware"]]
    per_epoch = statistics.median(record["seconds"] / record["epochs"] for record in same)
    return float(per_epoch * sum(cell.epochs for cell in cells))


def _rows(
    protocol: Protocol, block: Block, earlier: Mapping[str, list[Entry]], known: Mapping[str, Record]
) -> tuple[list[str], list[str]]:
    """Name the rows of a block; the second list says what those wait for that cannot be named yet."""
    named = [row for row in block.rows if isinstance(row, str)]
    waiting = []
    for best in block.rows:
        if not isinstance(best, Best):
            continue
        found, reason = _pool(protocol, best, earlier, known)
        rows = [] if reason else best_rows(found, best.best, best.of, without=named)
        if not reason and not rows:
            reason = "no finished cell to choose from"
        if reason:
            waiting.append(f"{block.name}: the best {best.best} of {best.of}: {reason}")
        named += rows
    return named, waiting


def _pool(
    protocol: Protocol, best: Best, earlier: Mapping[str, list[Entry]], known: Mapping[str, Record]
) -> tuple[list[Record], str]:
    """Return the records to choose the best from, or what they wait for."""
    if best.source is not None and best.source.endswith(".json"):
        return _from_file(protocol.folder / best.source)
    entries = earlier[best.source or protocol.blocks[0].name]
    open_ = sum(entry.state in (STARTED, TO_DO) for entry in entries)
    if open_:
        return [], f"waits for {open_} of {len(entries)} cells of {best.source or protocol.blocks[0].name!r}"
    return [known[entry.cell.id] for entry in entries if entry.state == DONE], ""


def _from_file(path: Path) -> tuple[list[Record], str]:
    return (read_records(path), "") if path.exists() else ([], f"needs {path}, which is not there")


def _entry(cell: Cell, record: Record | None, place: Place | None) -> Entry:
    if record is not None and not record.get("failed"):
        return Entry(cell, DONE)
    try:
        cell.choice().check()
    except DScoreError as error:
        return Entry(cell, UNFIT, str(error))
    if record is not None:
        return Entry(cell, FAILED, record["failed"])
    folder = cell.folder(place) if place else None
    started = folder is not None and (folder.exists() or folder.with_name(folder.name + ".work").exists())
    return Entry(cell, STARTED if started else TO_DO)
