"""Which rows are the best, by a rule that leaves nothing to taste."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence

from dscore_plugin.bench.records import Record, finished
from dscore_plugin.registry import get_criterion, list_criteria


def best_rows(
    records: Sequence[Record], count: int, of: str = "ours", *, without: Collection[str] = ()
) -> list[str]:
    """Return the best rows, the very best first.

    The rule: of the finished cells that prune channels in one go, uniformly and without distillation, with the
    lowest seed there is, the rows are ordered by top-1 on the *validation* images after fine-tuning (its mean where
    there are several targets); equals by their place in ``dscore list``, then by name. Test images play no part.

    Args:
        records: of one protocol.
        count: how many.
        of: ``"ours"`` leaves the baselines out, ``"all"`` does not.
        without: rows that are not asked for.

    Returns:
        At most ``count`` names of rows; rows with fewer targets than others are left out.
    """
    known = [record for record in finished(records) if _compares(record) and record["row"] not in without]
    first = min((record["seed"] for record in known), default=0)
    tops: dict[str, dict[float, float]] = {}
    for record in known:
        if record["seed"] == first and not (of == "ours" and get_criterion(record["criterion"]).baseline):
            tops.setdefault(record["row"], {})[record["target_macs"]] = record["validation_top1"]
    targets = {target for row in tops.values() for target in row}
    complete = {
        row: statistics.mean(found.values()) for row, found in tops.items() if found.keys() == targets
    }
    order = [info.name for info in list_criteria()]
    places = {record["row"]: order.index(record["criterion"]) for record in known}
    return sorted(complete, key=lambda row: (-complete[row], places[row], row))[:count]


def _compares(record: Record) -> bool:
    plain = record["allocation"] == "uniform" and record["rounds"] == 1 and not record["distill"]
    return plain and record["granularity"] == "channel" and record["validation_top1"] is not None
