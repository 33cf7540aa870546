"""What ``dscore bench`` is asked to do: run a protocol, list its cells, or show results that are there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dscore_plugin.bench.cells import Place
from dscore_plugin.bench.latencies import measure_latencies
from dscore_plugin.bench.protocol import Protocol, load_protocol
from dscore_plugin.bench.records import Record, read_records
from dscore_plugin.bench.runner import run_bench, time_left
from dscore_plugin.bench.summary import check_page, draw, tables, write_into
from dscore_plugin.bench.survey import FAILED, Survey, seconds_left, survey
from dscore_plugin.errors import BenchError
from dscore_plugin.training.progress import Progress

_RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class BenchRequest:
    """The options of ``dscore bench``.

    Attributes:
        protocol: a file; may be None with ``table``.
        data: as in :func:`dscore_plugin.datasets.load_data`.
        weights: a safetensors file.
        work: folder of runs.
        out: results file.
        device: to compute on.
        only: rows or criteria to run.
        redo: measure finished cells again.
        latency: measure the latencies of finished cells again, and run no cell.
        list_cells: show the cells, run none.
        table: results to show, run none.
        into: a page that takes the tables.
        plot: a folder that takes the pictures.
    """

    protocol: Path | None
    data: str = "cifar10"
    weights: Path | None = None
    work: Path | None = None
    out: Path | None = None
    device: str = "auto"
    only: tuple[str, ...] = ()
    redo: bool = False
    latency: bool = False
    list_cells: bool = False
    table: Path | None = None
    into: Path | None = None
    plot: Path | None = None

    def results(self, protocol: Protocol) -> Path:
        """Return the results file."""
        return self.out or _RESULTS / f"criteria_{protocol.name}.json"

    def place(self, protocol: Protocol) -> Place:
        """Return where to work; raise BenchError if the weights or the data are not the protocol's."""
        if self.weights is None:
            raise BenchError(
                f"the benchmark needs the trained weights of {protocol.model}; pass --weights FILE"
            )
        work = self.work or Path("runs/bench") / protocol.name
        place = Place(self.data, self.weights.resolve(), work.resolve(), self.device)
        place.check(protocol)
        return place


@dataclass(frozen=True)
class Answer:
    """What the command prints.

    Attributes:
        text: for readers.
        content: for programs.
        failed: whether a cell failed that was asked for.
    """

    text: str
    content: dict[str, Any]
    failed: bool = False


def run_request(request: BenchRequest, progress: Progress, say: Callable[[str], None]) -> Answer:
    """Do what the command line asks for.

    Args:
        request: its options.
        progress: shows bars.
        say: takes a line of news now and then.

    Raises:
        DScoreError: on bad input, before any work starts.
    """
    protocol = load_protocol(request.protocol) if request.protocol else None
    if request.table is not None:
        if request.only:
            raise BenchError("--only chooses what runs, --table shows everything; leave one of them out")
        records = read_records(request.table)
        return _show(request, request.table, records, survey(protocol, records) if protocol else None)
    if protocol is None:
        raise BenchError("name a protocol (benchmarks/criteria/*.json), or results with --table FILE")
    if request.redo and request.latency:
        raise BenchError("--latency runs no cell, --redo runs them all; leave one of them out")
    place, out = request.place(protocol), request.results(protocol)
    if request.list_cells:
        records = read_records(out) if out.exists() else []
        return _listed(survey(protocol, records, place).only(request.only), records, place)
    if request.into:
        check_page(request.into, out.stem)
    if request.latency:
        found = measure_latencies(protocol, place, out, only=request.only, say=say)
    else:
        found = run_bench(
            protocol, place, out, only=request.only, redo=request.redo, progress=progress, say=say
        )
    return _show(request, out, read_records(out) if out.exists() else [], found)


def _show(request: BenchRequest, file: Path, records: list[Record], found: Survey | None) -> Answer:
    text = tables(records, found)
    if request.into:
        write_into(request.into, file.stem, text)
    pictures = draw(records, request.plot, file.stem) if request.plot else []
    failed = request.table is None and found is not None and any(e.state == FAILED for e in found.entries)
    content = {
        "results": str(file),
        "cells": records,
        "missing": found.missing() if found else None,
        "pictures": [str(picture) for picture in pictures],
    }
    return Answer(text, content, failed)


def _listed(found: Survey, records: list[Record], place: Place) -> Answer:
    left = seconds_left(found.left, records)
    lines = [
        f"{entry.state:14}  {entry.cell.name}" + (f"  ({entry.reason})" if entry.reason else "")
        for entry in found.entries
    ]
    lines += [f"{'waiting':14}  {line}" for line in found.waiting]
    counts = f"cells to run: {len(found.left)} of {len(found.entries)}"
    counts += " (without those that wait)" if found.waiting else ""
    cells = [
        {
            "cell": e.cell.name,
            "id": e.cell.id,
            "state": e.state,
            "reason": e.reason,
            "command": e.cell.command(place.data),
        }
        for e in found.entries
    ]
    content = {"cells": cells, "waiting": list(found.waiting), "seconds_left": left}
    return Answer("\n".join([*lines, "", f"{counts}, {time_left(left)}"]), content)
