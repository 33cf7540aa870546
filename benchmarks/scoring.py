"""How long the criteria take to score a network, beside Torch-Pruning's L1 and FPGM.

The groups are built once and the classifier is ignored, as users do; every criterion then scores the same groups. The
criteria take turns, so that what else the machine does meets all alike; a result is the median of the ratios within
each turn.

    python benchmarks/scoring.py --out benchmarks/results/scoring.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import timm
import torch
import torch_pruning as tp
from measuring import here
from torch_pruning.dependency import Group

from dscore_plugin.files import write_json
from dscore_plugin.registry import get_criterion

CRITERIA = ("d_score", "d_step", "d_step_gm", "l1", "fpgm")
BOUNDS = {"d_score / l1": 1.0, "d_step_gm / fpgm": 0.6}
Importance = Callable[[Group], Any]


def groups_of(name: str, image_size: int) -> list[Group]:
    """Build a network with random weights and give the groups that a pruner would score."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    graph = tp.DependencyGraph().build_dependency(model, (torch.randn(1, 3, image_size, image_size),))
    return list(graph.get_all_groups(ignored_layers=[model.get_classifier()]))


def seconds(importance: Importance, groups: list[Group]) -> float:
    start = time.perf_counter()
    for group in groups:
        importance(group)
    return time.perf_counter() - start


def measure(name: str, repeats: int, image_size: int) -> dict[str, Any]:
    groups = groups_of(name, image_size)
    criteria = {criterion: get_criterion(criterion).build() for criterion in CRITERIA}
    for importance in criteria.values():
        seconds(importance, groups)  # imports, caches
    times: dict[str, list[float]] = {criterion: [] for criterion in CRITERIA}
    for _ in range(repeats):
        for criterion, importance in criteria.items():
            times[criterion].append(seconds(importance, groups))
    ratios = {pair: ratio(times, *pair.split(" / ")) for pair in BOUNDS}
    return {
        "model": name,
        "groups": len(groups),
        "ms": {criterion: spread([1e3 * value for value in values]) for criterion, values in times.items()},
        "ratios": ratios,
        "within_bounds": all(ratios[pair]["median"] <= bound for pair, bound in BOUNDS.items()),
    }


def ratio(times: dict[str, list[float]], ours: str, theirs: str) -> dict[str, float]:
    return spread([a / b for a, b in zip(times[ours], times[theirs], strict=True)])


def spread(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": round(statistics.median(values), 3), "iqr": round(high - low, 3)}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'model':<18} {'groups':>6} "
        + " ".join(f"{criterion + ' ms':>13}" for criterion in CRITERIA)
        + " ".join(f"{pair:>24}" for pair in BOUNDS)
    ]
    for row in rows:
        times = " ".join(f"{row['ms'][criterion]['median']:>13.1f}" for criterion in CRITERIA)
        cells = [f"{r['median']:.2f} (iqr {r['iqr']:.2f})" for r in row["ratios"].values()]
        lines.append(f"{row['model']:<18} {row['groups']:>6} {times}" + " ".join(f"{c:>24}" for c in cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", default="resnet18,resnet50,mobilenetv2_100", help="names in timm's registry"
    )
    parser.add_argument("--repeats", type=int, default=21, help="turns; each scores with every criterion")
    parser.add_argument("--image-size", type=int, default=64, help="for tracing; scores do not depend on it")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; one by default: work is compared, not spread"
    )
    parser.add_argument("--out", help="write the result here, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [measure(name, arguments.repeats, arguments.image_size) for name in arguments.models.split(",")]
    result = {
        "rows": rows,
        "bounds": BOUNDS,
        "repeats": arguments.repeats,
        **here(),
        "torch_pruning": metadata.version("torch-pruning"),
        "timm": timm.__version__,
    }
    print(table(rows))
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}))
    if arguments.out:
        write_json(arguments.out, result)
    return 0 if all(row["within_bounds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
