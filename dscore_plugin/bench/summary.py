"""Tables and plots of a benchmark, made from its records and from nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dscore_plugin.bench.records import STAGES, Options, Record, finished, name_of, options, schedule
from dscore_plugin.bench.survey import Survey
from dscore_plugin.errors import BenchError
from dscore_plugin.files import write_text
from dscore_plugin.report.criteria_plot import Bar, plot_bars, plot_over_macs

_HEADINGS = (
    "criterion", "allocation", "seeds", "pruned", "recalibrated", "fine-tuned", "MACs kept", "params kept",
    "speed-up, batch 1", "speed-up, batch 64", "scoring (s)",
)  # fmt: skip
_NONE = "–"
_SAID = ("granularity", "epochs", "rounds", "round-epochs", "distill")  # options: in label or title


@dataclass(frozen=True)
class Line:
    """The records that differ by their seed alone: one line of a table.

    Attributes:
        label: the row, and what sets it apart.
        allocation: of the removals to the layers.
        records: one for each seed.
    """

    label: str
    allocation: str
    records: tuple[Record, ...]

    def values(self, name: str) -> list[float]:
        """Return a number of each seed, without those that have none."""
        return [record[name] for record in self.records if record.get(name) is not None]

    def mean(self, name: str) -> float:
        """Return the mean over the seeds; minus infinity where there is none."""
        return statistics.mean(self.values(name) or [float("-inf")])

    def speed_ups(self, batch: str) -> list[float]:
        """Return for each seed how many times faster the pruned network is; both were measured in one run."""
        latencies = [record["latency_ms"].get(batch) for record in self.records]
        return [entry["dense"]["median"] / entry["pruned"]["median"] for entry in latencies if entry]


@dataclass(frozen=True)
class Group:
    """The lines that may be compared: the same trained network, target and epochs of fine-tuning.

    Attributes:
        model: the network.
        weights: their SHA-256.
        target_macs: share of the MACs to keep.
        epochs: of fine-tuning.
        lines: the best after fine-tuning first.
    """

    model: str
    weights: str
    target_macs: float
    epochs: int
    lines: tuple[Line, ...]

    @property
    def title(self) -> str:
        """What is compared, in words."""
        removed = f"{100 * (1 - self.target_macs):.4g} %"
        return f"{self.model}, {removed} of the MACs removed, {self.epochs} epochs of fine-tuning"

    @property
    def dense(self) -> float:
        """Top-1 of the dense network."""
        return float(self.lines[0].records[0]["top1_dense"])


class _Kind(NamedTuple):
    """What all records of a line have in common, and the lines of other targets beside it in a curve."""

    network: tuple[str, str, int]
    row: str
    allocation: str
    label: str
    options: Options

    @classmethod
    def of(cls, record: Record) -> _Kind:
        network = (record["model"], record["weights"]["sha256"], record["epochs"])
        return cls(network, record["row"], record["allocation"], _label(record), options(record))

    def label_among(self, kinds: Collection[_Kind]) -> str:
        """Return the label with the options that set it apart from all that it is, or could be, compared with."""
        comparable = [kind for kind in kinds if kind.network == self.network]
        of_row = [kind for kind in comparable if kind[:3] == self[:3]]
        alike = [kind for kind in of_row if kind.label == self.label]
        apart = self._apart_from(of_row) | schedule(self._apart_from(comparable))
        named = {option for option in apart if name_of(option) not in _SAID} | self._apart_from(alike)
        words = sorted(option.removeprefix("criterion-option ") for option in named)
        return _with_words(self.label, words)

    def _apart_from(self, kinds: Collection[_Kind]) -> Options:
        return self.options - frozenset.intersection(*(kind.options for kind in kinds))


def group_records(records: Sequence[Record]) -> list[Group]:
    """Sort finished records into groups and lines, in the order of the file."""
    groups: dict[tuple[str, str, float, int], dict[_Kind, list[Record]]] = {}
    for record in finished(records):
        name = (record["model"], record["weights"]["sha256"], record["target_macs"], record["epochs"])
        groups.setdefault(name, {}).setdefault(_Kind.of(record), []).append(record)
    kinds = {kind for found in groups.values() for kind in found}
    return [Group(*name, _lines(found, kinds)) for name, found in groups.items()]


def tables(records: Sequence[Record], asked: Survey | None = None) -> str:
    """Write every group as a Markdown table, then what failed and, where the protocol is known, what did not run."""
    parts = [_table(group) for group in group_records(records)]
    missing = asked.missing() if asked else _failures(records)
    if missing:
        parts.append("Without numbers:\n\n" + "\n".join(f"- {line}" for line in missing))
    return "\n\n".join(parts) if parts else "No cell is finished."


def write_into(page: Path, name: str, text: str) -> None:
    """Put text between the markers ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` of a page.

    Args:
        page: a Markdown file.
        name: of the markers.
        text: takes the place of what is there.

    Raises:
        BenchError: if the page or the markers are missing.
    """
    before, after = check_page(page, name)
    write_text(page, f"{before}\n\n{text}\n\n{after}")


def check_page(page: Path, name: str) -> tuple[str, str]:
    """Return a page up to the first of the markers of :func:`write_into`, and from the second on.

    Raises:
        BenchError: if the page or the markers are missing.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    content = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, found, rest = content.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise BenchError(f"{page} has no place for the tables; expected the lines {begin} and {end}")
    return before + begin, end + after


def draw(records: Sequence[Record], folder: Path, stem: str) -> list[Path]:
    """Draw bars for each group, and accuracy over MACs for each network and schedule with several targets.

    Args:
        records: of a results file.
        folder: takes the pictures.
        stem: begins their names.

    Returns:
        The PNGs; an SVG lies beside each.

    Raises:
        BenchError: if no cell is finished.
        DScoreError: if matplotlib is not installed.
    """
    groups = group_records(records)
    if not groups:
        raise BenchError("there is nothing to draw: no cell is finished")
    drawn, several = [], dict[tuple[str, str, int], list[Group]]()
    for number, group in enumerate(groups, start=1):
        several.setdefault((group.model, group.weights, group.epochs), []).append(group)
        name = f"{stem}_bars" + (f"_{number}" if len(groups) > 1 else "")
        drawn.append(plot_bars(_bars(group), folder / name, dense=group.dense, title=group.title)[0])
    for number, same in enumerate(several.values(), start=1):
        if len(same) > 1:
            name = f"{stem}_macs" + (f"_{number}" if len(several) > 1 else "")
            title = f"{same[0].model}, {same[0].epochs} epochs of fine-tuning"
            drawn.append(plot_over_macs(_curves(same), folder / name, dense=same[0].dense, title=title)[0])
    return drawn


def _lines(found: Mapping[_Kind, Sequence[Record]], kinds: Collection[_Kind]) -> tuple[Line, ...]:
    lines = [
        Line(kind.label_among(kinds), kind.allocation, tuple(sorted(records, key=lambda r: r["seed"])))
        for kind, records in found.items()
    ]
    return tuple(sorted(lines, key=lambda line: -line.mean("top1_finetuned")))


def _label(record: Record) -> str:
    apart = [] if record["granularity"] == "channel" else [f"{record['granularity']}s"]
    apart += [f"{record['rounds']} rounds"] if record["rounds"] > 1 else []
    apart += ["distilled"] if record["distill"] else []
    return _with_words(record["row"], apart)


def _with_words(label: str, words: Sequence[str]) -> str:
    """Add words in brackets to a label that may have some."""
    if not words:
        return label
    return f"{label[:-1]}, {', '.join(words)})" if label.endswith(")") else f"{label} ({', '.join(words)})"


def _table(group: Group) -> str:
    first = group.lines[0].records[0]
    several = any(len(line.records) > 1 for line in group.lines)
    spread = "; mean over the seeds (lowest to highest)" if several else ""
    rows = [_HEADINGS, *(_row(line) for line in group.lines)]
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    machines = dict.fromkeys(record["hardware"] for line in group.lines for record in line.records)
    return "\n".join(
        [
            f"**{group.title}**; dense {group.dense:.2f} %, {first['macs_dense'] / 1e6:.1f} M MACs, "
            f"{first['params_dense']:,} parameters; {first['test_images']:,} test images{spread}",
            "",
            head,
            "|---|---|" + "---:|" * (len(_HEADINGS) - 2),
            *body,
            "",
            f"Measured on: {'; '.join(machines)}.",
        ]
    )


def _row(line: Line) -> list[str]:
    cells = [f"`{line.records[0]['row']}`" + line.label.removeprefix(line.records[0]["row"]), line.allocation]
    cells += [str(len(line.records)), *(_spread(line.values(f"top1_{stage}")) for stage in STAGES)]
    cells += [_mean(line.values(name), lambda x: f"{x:.1%}") for name in ("macs_kept", "params_kept")]
    cells += [_mean(line.speed_ups(batch), lambda x: f"{x:.2f}x") for batch in ("1", "64")]
    return [*cells, _mean(line.values("scoring_seconds"), lambda x: f"{x:.1f}")]


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else _NONE
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _mean(values: Sequence[float], write: Callable[[float], str]) -> str:
    return write(statistics.mean(values)) if values else _NONE


def _failures(records: Sequence[Record]) -> list[str]:
    return [
        f"{_label(record)}, {record['allocation']}, {100 * (1 - record['target_macs']):.4g} % removed, "
        f"seed {record['seed']}: failed: {record['failed']}"
        for record in records
        if record.get("failed")
    ]


def _bars(group: Group) -> list[Bar]:
    several = len({line.allocation for line in group.lines}) > 1
    return [
        Bar(
            f"{line.label}, {line.allocation}" if several else line.label,
            {stage: line.values(f"top1_{stage}") for stage in STAGES},
        )
        for line in group.lines
    ]


def _curves(groups: Sequence[Group]) -> dict[str, dict[str, list[tuple[float, list[float]]]]]:
    """For each allocation and label the points: share of MACs kept, and top-1 of every seed."""
    curves: dict[str, dict[str, list[tuple[float, list[float]]]]] = {}
    for group in groups:
        for line in group.lines:
            tops = line.values("top1_finetuned")
            if tops:
                points = curves.setdefault(line.allocation, {}).setdefault(line.label, [])
                points.append((line.mean("macs_kept"), tops))
    return curves
