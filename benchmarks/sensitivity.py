"""How long layer sensitivity takes, beside the naive loop: copy, prune physically, evaluate everything, cell by cell.

Both measure the same groups at the same ratios on the same images. The naive loop goes through a part of the groups in
each turn; then the analysis measures all of them, plain and with its options for speed, so that what else the machine
does meets all alike. A quiet measurement, with the time of the full table (CIFAR-10's ResNet-56, 27 groups at 19
ratios on 2,000 validation images):

    python benchmarks/sensitivity.py --data cifar10:PATH --weights resnet56.safetensors --threads 1 \\
        --out benchmarks/results/sensitivity.json
    python benchmarks/sensitivity.py --data cifar10:PATH --weights resnet56.safetensors --full \\
        --out benchmarks/results/sensitivity.json

The first compares, on one core; the second adds the time of the full table, on all of them, to what is there.

Wall time is what counts; processor time, summed over threads, is less disturbed by others.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import here
from torch import nn

from dscore_plugin.datasets import ImageSet, load_data
from dscore_plugin.files import read_json, write_json
from dscore_plugin.groups import ScoredGroup, removal_count
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.plan import ChannelRemoval, Plan
from dscore_plugin.planning import score_groups
from dscore_plugin.registry import get_criterion
from dscore_plugin.selection.sensitivity import RATIOS, Sensitivity, ratio_key, sensitivity_analysis
from dscore_plugin.training.evaluation import evaluate

PLAIN, FAST = "plain float32", "folded batch norm, early exit"
BOUNDS = {PLAIN: 2.0, FAST: 3.0}
FULL_TABLE_MINUTES = 15


class Clock:
    """Sums wall and processor time of what it runs."""

    def __init__(self) -> None:
        self.wall, self.processor = 0.0, 0.0

    def run(self, do: Callable[[], Any]) -> Any:
        wall, processor = time.perf_counter(), time.process_time()
        result = do()
        self.wall += time.perf_counter() - wall
        self.processor += time.process_time() - processor
        return result

    def seconds(self) -> dict[str, float]:
        return {"wall_s": round(self.wall, 2), "processor_s": round(self.processor, 2)}


class Naive:
    """The loop that everyone writes first.

    Attributes:
        preparing: time to copy and prune.
        evaluating: time to evaluate.
        layers: what it measured.
    """

    def __init__(self, model: nn.Module, images: ImageSet, input_shape: tuple[int, ...]) -> None:
        self._model, self._images, self._shape = model, images, input_shape
        self.preparing, self.evaluating = Clock(), Clock()
        self.layers: dict[str, dict[str, float | None]] = {}

    def measure(self, item: ScoredGroup, ratios: Sequence[float]) -> None:
        cells: dict[str, float | None] = {}
        for ratio in ratios:
            smaller = self.preparing.run(lambda ratio=ratio: self.prune(item, ratio))
            cells[ratio_key(ratio)] = self.evaluating.run(lambda m=smaller: evaluate(m, self._images).top1)
        self.layers[item.group.name] = cells

    def prune(self, item: ScoredGroup, ratio: float) -> nn.Module:
        units = item.order[: removal_count(ratio, item.group.units)]
        removals = (ChannelRemoval(item.group.name, item.group.root_channels(units)),) if units else ()
        return Plan("", self._shape, removals).apply(copy.deepcopy(self._model), strict=False)

    def seconds(self) -> dict[str, float]:
        parts = {"preparing": self.preparing.seconds(), "evaluating": self.evaluating.seconds()}
        return {
            kind: round(sum(part[kind] for part in parts.values()), 2) for kind in ("wall_s", "processor_s")
        }


def spread_evenly(items: Sequence[Any], count: int) -> list[Any]:
    """Choose ``count`` items, each from the middle of its part of the list, so that they stand for all."""
    count = min(count, len(items))
    return [items[int((place + 0.5) * len(items) / count)] for place in range(count)]


def compare_tables(naive: Sensitivity, ours: Sensitivity) -> dict[str, Any]:
    """Compare cell by cell, and the ratios that follow at thresholds between the floor and the dense accuracy."""
    cells = [
        (ours.layers[layer][key], top1)
        for layer, row in naive.layers.items()
        for key, top1 in row.items()
        if ours.layers[layer][key] is not None
    ]
    off = [round(abs(a - b) * ours.images / 100) for a, b in cells if a != b]
    drops = [1, 2, 5, 10, 15, *([ours.early_exit] if ours.early_exit else [20, 50])]
    top = min(naive.dense_top1, ours.dense_top1)
    thresholds = [top - drop for drop in drops if top - drop >= max(naive.floor, ours.floor)]
    return {
        "cells": sum(map(len, naive.layers.values())),
        "compared": len(cells),
        "left_out": sum(top1 is None for row in ours.layers.values() for top1 in row.values()),
        "differing": len(off),
        "largest_difference_in_images": max(off, default=0),
        "thresholds": [round(t, 2) for t in thresholds],
        "same_ratios": [ours.ratios_at(t) == naive.ratios_at(t) for t in thresholds],
    }


def compare(
    model: nn.Module, scored: Sequence[ScoredGroup], images: ImageSet, shape: tuple[int, ...], args: Any
) -> dict[str, Any]:
    """Time the naive loop and the analysis in turns."""
    naive = Naive(model, images, shape)
    options = {PLAIN: {}, FAST: {"fold_batchnorm": True, "early_exit": args.early_exit}}
    clocks: dict[str, list[Clock]] = {name: [] for name in options}
    tables: dict[str, Sensitivity] = {}
    forms = {"as it is": Clock(), "in the layout of the analysis": Clock()}
    sensitivity_analysis(model, scored[:1], images.subset(64), ratios=args.ratios[:1])  # imports, first use
    for turn in range(args.turns):
        for item in scored[turn :: args.turns]:
            naive.measure(item, args.ratios)
            compare_forms(naive.prune(item, 0.5), images, args.batch_size, forms)
        for name, chosen in options.items():
            clocks[name].append(Clock())
            tables[name] = clocks[name][-1].run(
                lambda chosen=chosen: sensitivity_analysis(
                    model, scored, images, ratios=args.ratios, batch_size=args.batch_size, **chosen
                )
            )
        print(f"turn {turn + 1} of {args.turns} done", file=sys.stderr)
    expected = Sensitivity(
        evaluate(model, images).top1, len(images), tables[PLAIN].ratios, naive.layers, tables[PLAIN].orders
    )
    gain = {kind: forms["as it is"].seconds()[kind] for kind in ("wall_s", "processor_s")}
    gain = {k: round(v / forms["in the layout of the analysis"].seconds()[k], 2) for k, v in gain.items()}
    return {
        "naive": {
            **naive.seconds(),
            "preparing": naive.preparing.seconds(),
            "evaluating": naive.evaluating.seconds(),
        },
        "analysis": {
            name: summary(naive, clocks[name], compare_tables(expected, tables[name])) for name in options
        },
        "gain_of_channels_last_and_batch_size_alone": gain,
    }


def compare_forms(model: nn.Module, images: ImageSet, batch_size: int, clocks: dict[str, Clock]) -> None:
    """Time one evaluation as the naive loop does it, and as the analysis would."""
    as_it_is, changed = clocks.values()
    as_it_is.run(lambda: evaluate(model, images))
    model = model.to(memory_format=torch.channels_last)
    changed.run(lambda: evaluate(model, images, batch_size=batch_size))


def summary(naive: Naive, clocks: Sequence[Clock], numbers: dict[str, Any]) -> dict[str, Any]:
    seconds = {kind: [clock.seconds()[kind] for clock in clocks] for kind in ("wall_s", "processor_s")}
    return {
        **{kind: round(statistics.median(values), 2) for kind, values in seconds.items()},
        "wall_s_of_each_turn": seconds["wall_s"],
        "times_faster": {
            kind: round(naive.seconds()[kind] / statistics.median(values), 2)
            for kind, values in seconds.items()
        },
        **numbers,
    }


def full_tables(
    model: nn.Module, scored: Sequence[ScoredGroup], images: ImageSet, args: Any
) -> dict[str, Any]:
    """Time the whole table, once plain and once with the options for speed."""
    result: dict[str, Any] = {}
    for name, chosen in ((PLAIN, {}), (FAST, {"fold_batchnorm": True, "early_exit": args.early_exit})):
        clock = Clock()
        table = clock.run(
            lambda chosen=chosen: sensitivity_analysis(
                model, scored, images, batch_size=args.batch_size, **chosen
            )
        )
        cells = [top1 for layer in table.layers for top1 in table.curve(layer)]
        result[name] = {
            "minutes": round(clock.wall / 60, 2),
            "cells": len(cells),
            "left_out": cells.count(None),
        }
        print(f"full table, {name}: {clock.wall / 60:.1f} min", file=sys.stderr)
    return result


def report(result: dict[str, Any]) -> str:
    lines = [] if "naive" not in result else compared(result)
    for name, row in tables(result):
        lines.append(
            f"full table, {name}: {row['minutes']:.1f} min, {row['left_out']} of {row['cells']} left out"
        )
    return "\n".join(lines)


def tables(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, row) for name, row in result.get("full_table", {}).items() if isinstance(row, dict)]


def compared(result: dict[str, Any]) -> list[str]:
    naive = result["naive"]
    lines = [
        f"{'':<32} {'wall s':>9} {'cpu s':>9} {'faster':>8} {'(cpu)':>8}  same numbers",
        f"{'naive loop':<32} {naive['wall_s']:>9.1f} {naive['processor_s']:>9.1f}",
    ]
    for name, row in result["analysis"].items():
        faster = row["times_faster"]
        same = f"{row['compared'] - row['differing']} of {row['compared']} cells, {row['left_out']} left out"
        ratios = f"plans {'the same' if all(row['same_ratios']) else 'DIFFER'}"
        lines.append(
            f"{name:<32} {row['wall_s']:>9.1f} {row['processor_s']:>9.1f} {faster['wall_s']:>7.2f}x "
            f"{faster['processor_s']:>7.2f}x  {same}, {ratios}"
        )
    return lines


def within_bounds(result: dict[str, Any]) -> bool:
    rows = result.get("analysis", {})
    fast_enough = all(row["times_faster"]["wall_s"] >= BOUNDS[name] for name, row in rows.items())
    # an image on the edge between two classes may fall either way, as removal and masks round differently
    same = all(
        row["largest_difference_in_images"] <= 1 and row["differing"] <= 0.02 * row["compared"]
        for row in rows.values()
    )
    in_time = all(row["minutes"] < FULL_TABLE_MINUTES for _, row in tables(result))
    return fast_enough and same and all(all(row["same_ratios"]) for row in rows.values()) and in_time


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="e.g. cifar10:PATH")
    parser.add_argument("--weights", required=True, type=Path, help="safetensors")
    parser.add_argument("--model", default="cifar_resnet56")
    parser.add_argument("--criterion", default="d_score")
    parser.add_argument("--images", type=int, default=2000, help="of the validation split")
    parser.add_argument(
        "--groups", type=int, default=3, help="spread evenly over the depth; 27 takes an hour"
    )
    parser.add_argument(
        "--ratios",
        type=lambda text: tuple(map(float, text.split(","))),
        default=RATIOS,
        help="default: 0.05 to 0.95",
    )
    parser.add_argument("--turns", type=int, default=3, help="the naive loop's groups are divided among them")
    parser.add_argument("--early-exit", type=float, default=20.0, help="points below the dense accuracy")
    parser.add_argument("--batch-size", type=int, default=128, help="of the analysis")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--full", action="store_true", help="time the whole table, and compare nothing")
    parser.add_argument("--out", type=Path, help="write the result here, beside what the other run found")
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    data = load_data(args.data)
    model = create_model(args.model, num_classes=data.num_classes, in_chans=data.input_shape[0]).eval()
    load_weights(model, args.weights)
    images = data.validation.subset(min(args.images, len(data.validation)))
    graph = PruningGraph(model, (torch.zeros(1, *data.input_shape),))
    scored = score_groups(graph, get_criterion(args.criterion), layers="inner")
    result: dict[str, Any] = read_json(args.out) if args.out and args.out.exists() else {}
    if args.full:
        result["full_table"] = {**full_tables(model, scored, images, args), **here()}
    else:
        sample = spread_evenly(scored, args.groups)
        settings = {"model": args.model, "criterion": args.criterion, "images": len(images)}
        settings |= {"groups": [item.group.name for item in sample], "ratios": list(args.ratios)}
        settings |= {"early_exit": args.early_exit, "batch_size": args.batch_size, "bounds": BOUNDS}
        result |= {**settings, **here(), **compare(model, sample, images, data.input_shape, args)}
    result["within_bounds"] = within_bounds(result)
    print(report(result))
    if args.out:
        write_json(args.out, result)
    return 0 if result["within_bounds"] else 1


if __name__ == "__main__":
    sys.exit(main())
