"""Best of N random masks, plain and around D-Score, beside L1 and D-Score themselves, on the test images.

    python benchmarks/coarse_accuracy.py --data cifar10:PATH --weights resnet20.safetensors \\
        --out benchmarks/results/coarse_accuracy.json
    python benchmarks/coarse_accuracy.py --table benchmarks/results/coarse_accuracy.json    # as Markdown
    python benchmarks/coarse_accuracy.py --plot benchmarks/results/coarse_accuracy.json     # beside the file

For each ratio and proposal the largest number of candidates is compared on validation images; the winner among the
first N of them is what a search with N candidates finds. Each winner's channels, and those that L1 and D-Score choose
for the same layers, are removed, and top-1 on all test images is measured without retraining, as in the paper's Figure
3a, and once more after batch norm's statistics have been measured again. Cells that are measured already are kept in
``--work``.

Published weights, those of CIFAR's ResNets among them, were trained on the validation images, too; the choice then
sees images that the network knows.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import command, floats, here, ints
from torch import nn

from dscore_plugin import plan_pruning
from dscore_plugin.datasets import ImageData, ImageSet, load_data
from dscore_plugin.files import read_json, write_json
from dscore_plugin.groups import removal_count
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.plan import ChannelRemoval, Plan
from dscore_plugin.planning import score_groups
from dscore_plugin.registry import get_criterion
from dscore_plugin.report.coarse_plot import plot_best_so_far, plot_mcr
from dscore_plugin.selection.candidates import Options, Pool, Search, sample_candidate, search
from dscore_plugin.selection.coarse import channel_weights_removed, used_convolutions
from dscore_plugin.training.evaluation import evaluate, recalibrate_batchnorm

PROPOSALS = {"uniform": "random masks", "d_score": "around D-Score"}
CRITERIA = {"l1": "L1", "d_score": "D-Score"}


class Bench:
    """One network, its images, and the folder of what is measured already."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.data = args, load_data(args.data)
        self.work: Path = args.work / args.model
        shape = self.data.input_shape
        self.model = create_model(args.model, num_classes=self.data.num_classes, in_chans=shape[0]).eval()
        load_weights(self.model, args.weights)
        self.example = torch.zeros(1, *shape)
        self.graph = PruningGraph(self.model, (self.example,))
        self.groups = [group for group in self.graph.prunable if group.is_inner]
        self.images: ImageSet = self.data.validation.subset(min(args.images, len(self.data.validation)))

    def cell(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measure a cell, or read it where it was measured before."""
        file = self.work / f"{name}.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, measure())
            print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        return read_json(file)

    def pools(self, ratio: float, proposal: str) -> list[Pool]:
        scores = {}
        if proposal != "uniform":
            scored = score_groups(self.graph, get_criterion(proposal), layers="inner")
            scores = {item.group.name: item.scores for item in scored}
        return [
            Pool(g.name, g.units, removal_count(ratio, g.units), g, scores.get(g.name)) for g in self.groups
        ]

    def rows(self, ratio: float, proposal: str) -> list[dict[str, Any]]:
        """Return a row for each number of candidates."""
        pools, numbers = self.pools(ratio, proposal), self.args.numbers
        start = time.monotonic()
        file = self.work / f"search_{proposal}_{ratio:g}.jsonl"
        found = search(self.model, pools, self.images, Options(max(numbers)), checkpoint=file, resume=True)
        seconds, counts = time.monotonic() - start, {pool.name: pool.leaving for pool in pools}
        behind = used_convolutions(self.model, (self.example,))[1:]
        rows = []
        for number in numbers:
            index = found.best_of(number)
            removed = sample_candidate(pools, 0, index).removed
            plan = self.plan({name: tuple(gone.tolist()) for name, gone in removed.items()})
            tested = self.cell(f"{proposal}_{ratio:g}_{index}", lambda plan=plan: self.test(plan))
            rows.append(
                {
                    "ratio": ratio, "how": proposal, "candidates": number, "winner": index,
                    "validation_top1": _percent(found.correct[index], found.images), **tested,
                    "mean_validation_top1": _mean_best_of(found, number),
                    "weights_removed": round(channel_weights_removed(behind, self.groups, counts), 4),
                }
            )  # fmt: skip
        print(f"{proposal} at {ratio:g}: searched in {seconds:.0f} s", file=sys.stderr, flush=True)
        rows[-1]["best_so_far"] = _falls(found.best_so_far)
        return rows

    def criterion(self, ratio: float, name: str) -> dict[str, Any]:
        """Return the row of a criterion."""
        plan = plan_pruning(self.model, self.example, name, ratio=ratio, layers="inner")
        return {
            "ratio": ratio,
            "how": f"criterion_{name}",
            **self.cell(f"{name}_{ratio:g}", lambda: self.test(plan)),
        }

    def plan(self, removed: dict[str, tuple[int, ...]]) -> Plan:
        groups = {group.name: group for group in self.groups}
        removals = [ChannelRemoval(name, groups[name].root_channels(gone)) for name, gone in removed.items()]
        return Plan("", self.data.input_shape, tuple(removals))

    def test(self, plan: Plan) -> dict[str, Any]:
        """Measure a plan on the test images: at once, and with new statistics."""
        pruned = plan.apply(copy.deepcopy(self.model), strict=False)
        at_once = _top1(pruned, self.data)
        recalibrate_batchnorm(pruned, self.data.train.plain())
        return {"test_top1": at_once, "recalibrated_top1": _top1(pruned, self.data)}


def _top1(model: nn.Module, data: ImageData) -> float:
    return round(evaluate(model.to(memory_format=torch.channels_last), data.test).top1, 2)


def _percent(correct: int, images: int) -> float:
    return round(100 * correct / images, 2)


def _mean_best_of(found: Search, number: int) -> float:
    """Return what a search with N candidates finds on average, over the disjoint parts of those drawn."""
    starts = range(0, len(found.correct) - number + 1, number)
    best = [max(found.correct[start : start + number]) for start in starts]
    return _percent(sum(best), found.images * len(best))


def _falls(curve: tuple[float, ...]) -> list[list[float]]:
    kept = [[n + 1, round(rate, 3)] for n, rate in enumerate(curve) if n == 0 or rate < curve[n - 1]]
    return [*kept, [len(curve), round(curve[-1], 3)]]


def markdown(result: dict[str, Any]) -> str:
    """Arrange the results as a table, one for each way of measuring."""
    lines = []
    for key, title in (
        ("validation_top1", "validation top-1 (chosen on it)"),
        ("test_top1", "test top-1, no retraining"),
        ("recalibrated_top1", "test top-1, batch norm's statistics measured again"),
    ):
        columns = _columns(result, key)
        ratios = sorted({row["ratio"] for row in result["rows"]})
        lines += [title, "", "| " + " | ".join(["ratio", *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
        for ratio in ratios:
            cells = [f"{columns[name][ratio]:.2f}" if ratio in columns[name] else "" for name in columns]
            lines.append("| " + " | ".join([f"{ratio:g}", *cells]) + " |")
        lines.append("")
    return "\n".join([*lines, verdict(result)])


def _columns(result: dict[str, Any], key: str) -> dict[str, dict[float, float]]:
    columns: dict[str, dict[float, float]] = {}
    for row in result["rows"]:
        if key in row:
            columns.setdefault(_label(row), {})[row["ratio"]] = row[key]
    return columns


def _label(row: dict[str, Any]) -> str:
    if "candidates" in row:
        return f"{PROPOSALS[row['how']]}, best of {row['candidates']}"
    return CRITERIA[row["how"].removeprefix("criterion_")]


def verdict(result: dict[str, Any]) -> str:
    """Say where the best of the largest number beats L1 and D-Score before retraining, the paper's claim."""
    columns, most = _columns(result, "test_top1"), max(result["numbers"])
    lines = []
    for how in PROPOSALS.values():
        ours = columns.get(f"{how}, best of {most}", {})
        for criterion in CRITERIA.values():
            theirs = columns[criterion]
            better = [f"{ratio:g}" for ratio in ours if ours[ratio] > theirs[ratio]]
            lines.append(
                f"{how}, best of {most}, beats {criterion} on the test images, without retraining, at "
                f"{len(better)} of {len(ours)} ratios{': ' if better else ''}{', '.join(better)}"
            )
    return "\n".join(f"- {line}" for line in lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw both of the paper's figures beside the results."""
    shown = {*CRITERIA.values(), f"{PROPOSALS['uniform']}, best of {min(result['numbers'])}"}
    shown |= {f"{how}, best of {max(result['numbers'])}" for how in PROPOSALS.values()}
    errors = {
        name: sorted((ratio, 100 - top1) for ratio, top1 in column.items())
        for name, column in _columns(result, "test_top1").items()
        if name in shown
    }
    title = f"{result['model']}, before retraining"
    plot_mcr(errors, path.with_name(path.stem + "_mcr"), title=f"{title}: test images")
    curves = {
        f"{PROPOSALS[row['how']]}, {row['ratio']:.0%}": row["best_so_far"]
        for row in result["rows"]
        if "best_so_far" in row
    }
    plot_best_so_far(
        curves,
        path.with_name(path.stem + "_best_so_far"),
        title=f"{title}: {result['images']} validation images",
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="cifar10:PATH")
    parser.add_argument("--weights", type=Path, help="safetensors")
    parser.add_argument("--table", type=Path, help="print these results as Markdown, and measure nothing")
    parser.add_argument("--plot", type=Path, help="draw these results, and measure nothing")
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--ratios", type=floats, default=(0.2, 0.3, 0.4, 0.5, 0.6))
    parser.add_argument("--numbers", type=ints, default=(1, 10, 50, 100, 200), help="of candidates")
    parser.add_argument("--images", type=int, default=1000, help="validation images to choose on")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/coarse_accuracy"), help="what is measured already"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/coarse_accuracy.json"))
    args = parser.parse_args()
    if not (args.table or args.plot or (args.data and args.weights)):
        parser.error("--data and --weights are needed to measure")
    return args


def main() -> None:
    args = parse()
    if args.table or args.plot:
        result = read_json(args.table or args.plot)
        if args.table:
            print(markdown(result))
        if args.plot:
            plot(result, args.plot)
        return
    bench = Bench(args)
    dense = bench.cell("dense", lambda: {"test_top1": _top1(copy.deepcopy(bench.model), bench.data)})
    rows = []
    for ratio in args.ratios:
        rows += [bench.criterion(ratio, name) for name in CRITERIA]
        rows += [row for proposal in PROPOSALS for row in bench.rows(ratio, proposal)]
    result = {
        "model": args.model, "images": len(bench.images), "test_images": len(bench.data.test),
        "numbers": list(args.numbers), "dense_test_top1": dense["test_top1"], "rows": rows,
        **here(),
        "command": command(),
    }  # fmt: skip
    write_json(args.out, result)
    print(markdown(result))
    plot(result, args.out)


if __name__ == "__main__":
    main()
