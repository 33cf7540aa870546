"""Which rows are the best, by a rule that leaves nothing to taste."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence

from dscore_plugin.bench.records import Options, Record, finished, options, schedule
from dscore_plugin.registry import get_criterion, list_criteria


def best_rows(
    records: Sequence[Record], count: int, of: str = "ours", *, without: Collection[str] = ()
) -> list[str]:
    """Return the best rows, the very best first.

    The rule: of the finished cells that prune channels in one go, uniformly and without distillation, with the
    lowest seed there is, the rows are ordered by top-1 on the *validation* images after fine-tuning (its mean where
    there are several targets); equals by their place in ``dscore list``, then by name. Test images play no part.
    Only cells of the same network, weights and training are compared: those with the most rows, or of several such the
    first. Of a row with several settings the last counts.

    Args:
        records: of a block, or of a results file.
        count: how many.
        of: ``"ours"`` leaves the baselines out, ``"all"`` does not.
        without: rows that are not asked for.

    Returns:
        At most ``count`` names of rows; rows with fewer targets than others are left out.
    """
    known = _of_one_schedule([record for record in finished(records) if _compares(record)])
    known = [record for record in known if record["row"] not in without]
    first = min((record["seed"] for record in known), default=0)
    tops: dict[tuple[str, Options], dict[float, float]] = {}
    for record in known:
        if record["seed"] == first and not (of == "ours" and get_criterion(record["criterion"]).baseline):
            found = tops.setdefault((record["row"], options(record)), {})
            found[record["target_macs"]] = record["validation_top1"]
    targets = {target for found in tops.values() for target in found}
    complete = {
        row: statistics.mean(found.values()) for (row, _), found in tops.items() if found.keys() == targets
    }
    order = [info.name for info in list_criteria()]
    places = {record["row"]: order.index(record["criterion"]) for record in known}
    return sorted(complete, key=lambda row: (-complete[row], places[row], row))[:count]


def _of_one_schedule(records: Sequence[Record]) -> list[Record]:
    found: dict[tuple[str, str, int, Options], list[Record]] = {}
    for record in records:
        of = (record["model"], record["weights"]["sha256"], record["epochs"], schedule(options(record)))
        found.setdefault(of, []).append(record)
    return max(found.values(), key=lambda alike: len({record["row"] for record in alike}), default=[])


def _compares(record: Record) -> bool:
    plain = record["allocation"] == "uniform" and record["rounds"] == 1 and not record["distill"]
    return plain and record["granularity"] == "channel" and record["validation_top1"] is not None
