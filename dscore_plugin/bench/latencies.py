"""Latencies of finished cells, measured again: one network after the other, on a machine that does nothing else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dscore_plugin.artifact import load_pruned
from dscore_plugin.bench.cells import Cell, Place
from dscore_plugin.bench.hardware import hardware_name
from dscore_plugin.bench.protocol import Protocol
from dscore_plugin.bench.records import Record, of_weights, read_records, shares_kept
from dscore_plugin.bench.runner import keep, measure_table
from dscore_plugin.bench.survey import DONE, Survey, survey
from dscore_plugin.choosing import choose, example_of
from dscore_plugin.costs import count
from dscore_plugin.errors import BenchError
from dscore_plugin.report.numbers import latency

_TURNS = 3


def measure_latencies(
    protocol: Protocol,
    place: Place,
    out: Path,
    *,
    only: Collection[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Survey:
    """Measure the latency of every finished cell, one after the other, each in turns with the dense network.

    Cells that several processes measure share the machine, and their latencies scatter. Of three pairs of measurements
    the one with the median ratio is taken. A cell whose network is not in the work folder, as it was measured elsewhere
    or long ago, is pruned anew, without its training: that has no influence on the shape of a network pruned in one go.
    Cells that were measured on other hardware or with another number of threads, and those whose network cannot be had
    again, stay as they are, with a line that says so.

    Args:
        protocol: what was run.
        place: where the network, the images and the work folder are.
        out: the results file.
        only: names of rows or criteria; none stands for all.
        say: takes a line for every cell.

    Returns:
        How every cell stands.

    Raises:
        DScoreError: if the protocol, the weights and the results do not fit together.
    """
    place.check(protocol)
    records = read_records(out)
    found, known = survey(protocol, records, place).only(only), of_weights(records, place.digest)
    source = place.source(protocol.model, protocol.blocks[0].seeds[0])
    data, device = source.load_images(), source.find_device()
    dense, here = source.build(data), hardware_name(device)
    for cell in (entry.cell for entry in found.entries if entry.state == DONE):
        record = known[cell.id]
        if record["hardware"] != here:
            say(f"{cell.name}: measured on {record['hardware']}, this is {here}; left as it is")
            continue
        try:
            network = _network(cell, record, place, say)
        except BenchError as error:
            say(f"{cell.name}: its network is not in {place.work}, and {error}; left as it is")
            continue
        times = in_turns(dense, network, data.input_shape)
        keep({**record, "latency_ms": times}, cell, place, out)
        ratios = {b: pair["dense"]["median"] / pair["pruned"]["median"] for b, pair in times.items()}
        say(f"{cell.name}: {', '.join(f'{r:.2f}x at batch {b}' for b, r in ratios.items())}")
    return found


def _network(cell: Cell, record: Record, place: Place, say: Callable[[str], None]) -> nn.Module:
    """Return the network of a cell, in its shape if not with its weights; raise BenchError if it cannot be had."""
    folder, job = cell.folder(place), cell.job(place)
    if folder.exists():
        return load_pruned(folder, device=job.source.find_device())
    if job.rounds > 1:
        raise BenchError("each round chooses from what the one before has trained")
    if cell.shares_table:
        measure_table(cell, place, None, say)
    data = job.source.load_images()
    network = job.source.build(data)
    choose(job.source, job.choices[0], network, data).apply(network)
    dense = (record["macs_dense"], record["params_dense"])
    kept = shares_kept(dense, count(network, (example_of(job.source, data),)))
    if any(kept[name] != record[name] for name in kept):
        raise BenchError(f"pruned anew it has other sizes here, {kept}")
    return network


def in_turns(dense: nn.Module, pruned: nn.Module, input_shape: Sequence[int]) -> dict[str, Any]:
    """Return for each batch size what ``dense`` and ``pruned`` take, of several pairs the one with the median ratio."""
    pairs = [(latency(dense, input_shape), latency(pruned, input_shape)) for _ in range(_TURNS)]

    def middle(batch: str) -> dict[str, Any]:
        ordered = sorted(pairs, key=lambda pair: pair[0][batch]["median"] / pair[1][batch]["median"])
        return dict(zip(("dense", "pruned"), (times[batch] for times in ordered[_TURNS // 2]), strict=True))

    return {batch: middle(batch) for batch in pairs[0][0]}
