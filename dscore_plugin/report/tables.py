"""The numbers of a run as a table in the terminal, and as the text of ``report.md``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dscore_plugin.plan import read_removal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Metrics = Mapping[str, Any]
_STAGES = {
    "dense": "dense",
    "pruned": "pruned",
    "recalibrated": "pruned, batch norm recalibrated",
    "finetuned": "pruned, fine-tuned",
}
_NONE = "–"
_LEGEND = (
    "Top-1 with its change, MACs of one image and parameters with the part that is left, latency of a batch: "
    "median ± interquartile range with the speed-up."
)
_SCATTER = 0.3  # interquartile range over median, from which on a latency says little
_SCATTERED = (
    "The latencies scatter by more than {:.0f} % of their median: something else was running. Do not trust the "
    "speed-ups; measure again with `dscore evaluate` on a quiet machine."
)

_CHOSEN_BY_TEST = ", which the ratios therefore know: do not compare top-1 with that of other runs"


def metrics_table(metrics: Metrics, title: str | None = None) -> Table:
    """Arrange the metrics as a rich table: one row for each stage, ratios to the dense network in brackets.

    Args:
        metrics: the content of ``metrics.json``; stages and numbers that are null or missing show as a dash.
        title: above the table.

    Returns:
        The table.
    """
    from rich.table import Table

    head, *rows = _rows(metrics)
    table = Table(title=title, caption=_scattered(metrics) or None)
    for index, column in enumerate(head):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


def print_metrics(metrics: Metrics, title: str | None = None, console: Console | None = None) -> None:
    """Print the table of the metrics, by default on stderr, so that stdout stays free for results.

    Args:
        metrics: the content of ``metrics.json``.
        title: above the table.
        console: where to print.
    """
    from rich.console import Console

    (console or Console(stderr=True)).print(metrics_table(metrics, title))


def report_markdown(
    structure: Mapping[str, Any],
    metrics: Metrics,
    *,
    sizes: Mapping[str, int] | None = None,
    dense_bytes: int | None = None,
    command: str | None = None,
    folder: str | None = "FOLDER",
) -> str:
    """Write ``report.md``: what was pruned and how, the numbers before and after, how to load it again.

    Args:
        structure: the content of ``pruned_structure.json``.
        metrics: the content of ``metrics.json``.
        sizes: bytes of each file of the artifact.
        dense_bytes: bytes of the dense network's weights, to compare with.
        command: the command line that made the artifact.
        folder: the artifact, as the section on loading names it; None leaves the section out.

    Returns:
        Markdown, ending in a line break.
    """
    parts = [
        f"# {structure['architecture']}, pruned",
        _facts(structure),
        "## Numbers\n\n" + _numbers(structure, metrics),
        _kernels(metrics.get("kernels")),
        _plan(structure.get("plan")),
        _layers(structure["modules"]),
        _files(sizes, dense_bytes),
        f"## Command\n\n```\n{command}\n```" if command else "",
        "## Load it again\n\n" + _loading(structure, folder) if folder is not None else "",
        "## Versions\n\n" + _list(structure["versions"].items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _rows(metrics: Metrics) -> list[list[str]]:
    """The table as text, its head first; latency columns as the metrics have them."""
    stages = {stage: metrics.get(stage) or {} for stage in _STAGES}
    batches = sorted({batch for row in stages.values() for batch in row.get("latency_ms") or {}}, key=int)
    head = ["network", "top-1 (%)", "MACs", "params", *(f"latency, batch {batch} (ms)" for batch in batches)]
    rows = [head]
    for stage, numbers in stages.items():
        if numbers:
            cells = [_top1(numbers.get("top1"), stages["dense"].get("top1"))]
            cells += [_amount(numbers.get(key), stages["dense"].get(key)) for key in ("macs", "params")]
            cells += [_latency(numbers, stages["dense"], batch) for batch in batches]
        else:
            cells = [_NONE] * (len(head) - 1)
        rows.append([_STAGES[stage], *cells])
    return rows


def _top1(value: float | None, dense: float | None) -> str:
    if value is None:
        return _NONE
    change = "" if dense is None or value is dense else f" ({value - dense:+.2f})"
    return f"{value:.2f}{change}"


def _amount(value: float | None, dense: float | None) -> str:
    if value is None:
        return _NONE
    kept = f" ({100 * value / dense:.1f} %)" if dense and value is not dense else ""
    return f"{_human(value)}{kept}"


def _latency(numbers: Mapping[str, Any], dense: Mapping[str, Any], batch: str) -> str:
    found = (numbers.get("latency_ms") or {}).get(batch)
    if not found:
        return _NONE
    before = (dense.get("latency_ms") or {}).get(batch)
    faster = f" ({before['median'] / found['median']:.2f}x)" if before and before is not found else ""
    return f"{_milliseconds(found['median'], 3)} ± {_milliseconds(found['iqr'], 2)}{faster}"


def _scattered(metrics: Metrics) -> str:
    """What to say if a latency was disturbed."""
    found = [
        entry for stage in _STAGES for entry in ((metrics.get(stage) or {}).get("latency_ms") or {}).values()
    ]
    disturbed = any(entry["iqr"] > _SCATTER * entry["median"] for entry in found)
    return _SCATTERED.format(100 * _SCATTER) if disturbed else ""


def _milliseconds(value: float, digits: int) -> str:
    """A time with so many digits, and no exponent."""
    return f"{value:.0f}" if value >= 10**digits else f"{value:.{digits}g}"


def _human(value: float) -> str:
    """A count with three or four digits and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:g}"


def _bytes(value: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value} bytes"


def _facts(structure: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{key}={value!r}" for key, value in structure["model_args"].items())
    shape = structure["input_shape"]
    facts = {
        "architecture": f"`{structure['architecture']}`" + (f" with {arguments}" if arguments else ""),
        "criterion": f"`{structure['criterion']}`" if structure["criterion"] else "not recorded",
        "input": " x ".join(str(size) for size in shape) if shape else "not recorded",
        "layers changed": str(len(structure["modules"])),
    }
    return _list(facts.items())


def _numbers(structure: Mapping[str, Any], metrics: Metrics) -> str:
    numbers = structure.get("numbers") or {}
    before, after = numbers.get("before") or {}, numbers.get("after") or {}
    if any(metrics.get(stage) for stage in _STAGES):
        return "\n\n".join(filter(None, [_markdown_table(_rows(metrics)), _LEGEND, _scattered(metrics)]))
    if not before or not after:
        return "None were measured."
    rows = [["", "before", "after"]]
    for key in sorted(before.keys() & after.keys()):
        rows.append([key, _amount(before[key], None), _amount(after[key], before[key])])
    return _markdown_table(rows)


def _kernels(numbers: Mapping[str, Mapping[str, Any]] | None) -> str:
    """What a network that has lost kernels would cost if zeros were free."""
    if not numbers:
        return ""
    rows = [["", "of the tensors' shapes", "without the zero kernels"]]
    for key in ("macs", "params", "kernels"):
        physical, effective = numbers[key]["physical"], numbers[key]["effective"]
        rows.append([key, _amount(physical, None), _amount(effective, physical)])
    text = "The table above counts the tensors as they are; removed kernels are zeros in them."
    parts = ["## Kernels", text, _markdown_table(rows)]
    if "latency_ms" in numbers:
        parts += [_SPARSE_TEXT, _markdown_table(_sparse_rows(numbers["latency_ms"]))]
    return "\n\n".join(parts)


_SPARSE_TEXT = (
    "Each convolution on the backend that is fastest on this machine (`dscore_plugin.load_for_inference`), beside "
    "dense execution of the same network, in turns:"
)


def _sparse_rows(latencies: Mapping[str, Any]) -> list[list[str]]:
    rows = [["batch", "dense", "sparse", "convolutions on"]]
    for batch, entry in latencies.items():
        backends = ", ".join(f"{name}: {number}" for name, number in entry["backends"].items())
        rows.append([batch, f"{entry['dense']:.2f} ms", f"{entry['sparse']:.2f} ms", backends])
    return rows


def _plan(plan: Mapping[str, Any] | None) -> str:
    """How each stage's plan was made, and what it took from each layer."""
    if not plan:
        return ""
    stages = plan.get("stages") or [plan]
    titles = ["## Plan"] if len(stages) == 1 else [f"## Plan of stage {n}" for n in range(1, len(stages) + 1)]
    return "\n\n".join(_one_plan(title, stage) for title, stage in zip(titles, stages, strict=True))


def _one_plan(title: str, plan: Mapping[str, Any]) -> str:
    removals = [read_removal(entry) for entry in plan.get("removals") or ()]
    widths = {row["layer"]: row["channels"] for row in plan.get("rows") or ()}
    rows = [["layer", removals[0].type if removals else "channels", "removed"]]
    for removal in removals:
        before, removed = widths.get(removal.layer), len(removal.indices)
        left = f"{before} → {before - removed}" if before is not None else _NONE
        rows.append([f"`{removal.layer}`", left, str(removed)])
    made_by = {**(plan.get("made_by") or {})}
    if measured := made_by.get("sensitivity"):
        made_by["sensitivity"] = f"measured on {measured['images']} {measured['protocol']} images"
        if measured["protocol"] == "test":
            made_by["sensitivity"] += _CHOSEN_BY_TEST
    return "\n\n".join(
        [title, *filter(None, [_list(made_by.items()), _markdown_table(rows) if removals else ""])]
    )


def _layers(modules: Mapping[str, Mapping[str, Any]]) -> str:
    if not modules:
        return ""
    rows = [["layer", "type", "after pruning"]]
    for name, entry in modules.items():
        changes = entry["attributes"] or entry["shapes"]
        text = ", ".join(f"{key} = {_size(value)}" for key, value in changes.items())
        rows.append([f"`{name}`" if name else "(the model)", entry["class"], text])
    return "## Layers\n\n" + _markdown_table(rows)


def _size(value: Any) -> str:
    return " x ".join(str(size) for size in value) if isinstance(value, (list, tuple)) else str(value)


def _files(sizes: Mapping[str, int] | None, dense_bytes: int | None) -> str:
    rows = [["file", "size"], *([f"`{name}`", _bytes(size)] for name, size in (sizes or {}).items())]
    if dense_bytes:
        rows.append(["weights of the dense network", _bytes(dense_bytes)])
    return "## Files\n\n" + _markdown_table(rows) if len(rows) > 1 else ""


def _loading(structure: Mapping[str, Any], folder: str) -> str:
    custom = structure["architecture"] == "custom"
    call = f'load_pruned("{folder}"{", model=dense_model" if custom else ""})'
    need = (
        "build the dense model as it was before pruning; it is narrowed in place"
        if custom
        else "no pickle, no tracing"
    )
    return f"```python\nfrom dscore_plugin import load_pruned\n\nmodel = {call}  # {need}\n```"


def _list(items: Iterable[tuple[str, Any]]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in items)


def _markdown_table(rows: list[list[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    head, *body = ["| " + " | ".join(row) + " |" for row in escaped]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
