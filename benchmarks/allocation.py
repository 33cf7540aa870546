"""Sensitivity-aware against uniform allocation, before fine-tuning, at the same MACs, on the test images.

    python benchmarks/allocation.py --data cifar10:PATH --weights FOLDER --out benchmarks/results/allocation.json
    python benchmarks/allocation.py --table benchmarks/results/allocation.json    # as Markdown

For each network and criterion: the sensitivity table on held-out training images, one plan for each allocation at half
of the MACs, removal, batch-norm recalibration, top-1. The two networks of a pair are compared image by image: the
95 % interval is that of a paired difference. Tables that are measured already are kept in ``--work``.
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dscore_plugin import plan_pruning
from dscore_plugin.datasets import ImageData, load_data
from dscore_plugin.files import read_json, write_json
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.planning import score_groups
from dscore_plugin.registry import get_criterion
from dscore_plugin.selection.sensitivity import Sensitivity, sensitivity_analysis
from dscore_plugin.training.evaluation import recalibrate_batchnorm
from dscore_plugin.training.progress import RichProgress


def main() -> None:
    """Measure every cell and write them as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="cifar10:PATH")
    parser.add_argument("--weights", type=Path, help="folder with resnet20.safetensors, ...")
    parser.add_argument("--table", type=Path, help="print these results as Markdown, and measure nothing")
    parser.add_argument("--models", default="cifar_resnet20,cifar_resnet56")
    parser.add_argument("--criteria", default="d_score,l1")
    parser.add_argument("--target-macs", type=float, default=0.5)
    parser.add_argument(
        "--images", type=int, default=2000, help="validation images of the sensitivity analysis"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/allocation"), help="where tables are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/allocation.json"))
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(read_json(arguments.table)))
        return
    if not (arguments.data and arguments.weights):
        parser.error("--data and --weights are needed to measure")
    data = load_data(arguments.data)
    rows = [
        cell
        for model in arguments.models.split(",")
        for criterion in arguments.criteria.split(",")
        for cell in compare(arguments, data, model, criterion)
    ]
    write_json(arguments.out, rows)


def compare(
    arguments: argparse.Namespace, data: ImageData, name: str, criterion: str
) -> list[dict[str, Any]]:
    """Prune one network by one criterion under both allocations; a row for each."""
    dense = create_model(name)
    load_weights(dense, arguments.weights / f"{name.removeprefix('cifar_')}.safetensors")
    dense.eval()
    table, seconds = measure_table(arguments, data, dense, name, criterion)
    right, rows = {}, []
    for allocation in ("uniform", "sensitivity"):
        model = copy.deepcopy(dense)
        plan = plan_pruning(
            model, torch.zeros(1, 3, 32, 32), criterion, target_macs=arguments.target_macs,
            allocation=allocation, sensitivity=table,
        )  # fmt: skip
        plan.apply(model)
        pruned = correct(model, data)
        recalibrate_batchnorm(model, data.train.plain())
        right[allocation] = correct(model, data)
        row = {
            "model": name, "criterion": criterion, "allocation": allocation,
            "macs_kept": round(plan.macs[1] / plan.macs[0], 4),
            "params_kept": round(plan.params[1] / plan.params[0], 4),
            "top1_dense": percent(correct(dense, data)), "top1_pruned": percent(pruned),
            "top1_recalibrated": percent(right[allocation]), "test_images": len(data.test),
            "sensitivity_images": table.images, "sensitivity_seconds": seconds,
            "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__,
        }  # fmt: skip
        print(row, flush=True)
        rows.append(row)
    rows[1]["gain_over_uniform"] = paired_interval(right["sensitivity"], right["uniform"])
    return rows


def measure_table(
    arguments: argparse.Namespace, data: ImageData, model: nn.Module, name: str, criterion: str
) -> tuple[Sensitivity, float | None]:
    """Measure the sensitivity table, or read it where it was measured before."""
    path = arguments.work / f"{name}-{criterion}" / "sensitivity.json"
    if path.exists():
        return Sensitivity.load(path), None
    scored = score_groups(PruningGraph(model, (torch.zeros(1, 3, 32, 32),)), get_criterion(criterion))
    images = data.validation.subset(arguments.images)
    start = time.monotonic()
    table = sensitivity_analysis(
        model, scored, images, criterion=criterion, checkpoint=path.with_suffix(".cells"), resume=True,
        progress=RichProgress(),
    )  # fmt: skip
    seconds = round(time.monotonic() - start, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, table.to_dict())
    return table, seconds


@torch.inference_mode()
def correct(model: nn.Module, data: ImageData) -> Tensor:
    """Return for each test image whether the first guess was right."""
    model.eval()
    return torch.cat([model(images).argmax(1) == labels for images, labels in data.test.loader(256)])


def percent(right: Tensor) -> float:
    """Return top-1 in percent."""
    return round(100 * right.double().mean().item(), 2)


def paired_interval(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Return the difference in points and its 95 % interval, from the per-image differences."""
    difference = ours.double() - theirs.double()
    mean, half = difference.mean().item(), 1.96 * difference.std().item() / math.sqrt(len(difference))
    return {
        "points": round(100 * mean, 2),
        "low": round(100 * (mean - half), 2),
        "high": round(100 * (mean + half), 2),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Arrange the results as a table."""
    lines = [
        "| network | criterion | allocation | MACs kept | params kept "
        "| dense | pruned | recalibrated | gain, 95 % interval |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gain = row.get("gain_over_uniform")
        text = "" if gain is None else f"{gain['points']:+.2f} ({gain['low']:+.2f} to {gain['high']:+.2f})"
        kept = f"{row['macs_kept']:.1%} | {row['params_kept']:.1%}"
        tops = f"{row['top1_dense']:.2f} | {row['top1_pruned']:.2f} | {row['top1_recalibrated']:.2f}"
        lines.append(
            f"| {row['model']} | `{row['criterion']}` | {row['allocation']} | {kept} | {tops} | {text} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
