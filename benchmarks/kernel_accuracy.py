"""Accuracy over kernel sparsity: synaptic strength beside the mean magnitude of a kernel and beside chance.

    python benchmarks/kernel_accuracy.py --data cifar10:PATH --weights resnet20.safetensors \\
        --out benchmarks/results/kernel_accuracy.json
    python benchmarks/kernel_accuracy.py --table benchmarks/results/kernel_accuracy.json    # as Markdown
    python benchmarks/kernel_accuracy.py --plot benchmarks/results/kernel_accuracy.json     # beside the file

The kernels of all convolutions but the first are ordered by each criterion, and the lowest share leaves by
one threshold for the whole network (for chance: by random scores, so that every layer loses about the same
share). Top-1 on all test images is measured at once, after batch norm's statistics have been measured again,
and after a short fine-tuning under the fixed masks. The network is an ordinary one, not trained with
strengths: this is the criterion post hoc. Cells that are measured already are kept in ``--work``; an
interrupted fine-tuning goes on from its last epoch.
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from measuring import command, floats, here
from torch import Tensor, nn

from dscore_plugin.artifact import WEIGHTS, save_pruned
from dscore_plugin.datasets import ImageData, load_data
from dscore_plugin.files import read_json, write_json
from dscore_plugin.integrations.torch_pruning.synaptic import kernel_scores
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.plan import Plan
from dscore_plugin.report.kernel_plot import plot_kernels
from dscore_plugin.selection.kernels import plan_kernels
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.evaluation import evaluate, recalibrate_batchnorm
from dscore_plugin.training.loop import train

CRITERIA = {"synaptic_strength": "synaptic strength", "mean_magnitude": "mean |w|", "random": "random"}
STAGES = {"top1": "at once", "recalibrated": "statistics measured again", "finetuned": "fine-tuned"}


class Bench:
    """One network, its images, and the folder of what is measured already."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.data = args, load_data(args.data)
        self.work: Path = args.work / args.model
        self.work.mkdir(parents=True, exist_ok=True)
        shape = self.data.input_shape
        self.model = create_model(args.model, num_classes=self.data.num_classes, in_chans=shape[0]).eval()
        load_weights(self.model, args.weights)
        self.example = (torch.zeros(1, *shape),)

    def dense(self) -> float:
        """Return the dense network's top-1 on the test images."""
        file = self.work / "dense.json"
        if not file.exists():
            write_json(file, {"top1": top1(self.model, self.data)})
        return float(read_json(file)["top1"])

    def cell(self, criterion: str, ratio: float, seed: int) -> dict[str, Any]:
        """Measure one criterion at one ratio, or read it where it was measured before."""
        name = f"{criterion}_{ratio:g}_epochs{self.args.epochs}_seed{seed}"
        file, checkpoint = self.work / f"{name}.json", self.work / name
        if not file.exists():
            plan = self.plan(criterion, ratio, seed)
            model = plan.apply(copy.deepcopy(self.model))
            row: dict[str, Any] = {"criterion": criterion, "ratio": ratio, "seed": seed}
            row |= {"macs_kept": round(plan.macs[1] / plan.macs[0], 4), "top1": top1(model, self.data)}
            recalibrate_batchnorm(model, self.data.train.plain())
            row["recalibrated"] = top1(model, self.data)
            config = TrainingConfig(self.args.epochs, self.args.learning_rate, weight_decay=1e-4, seed=seed)
            train(model, self.data.train, None, config, checkpoint=checkpoint, resume=True)
            row["finetuned"] = top1(model, self.data)
            write_json(file, row)
            shutil.rmtree(checkpoint, ignore_errors=True)
            print(f"{time.strftime('%H:%M:%S')} {row}", file=sys.stderr, flush=True)
        return read_json(file)

    def plan(self, criterion: str, ratio: float, seed: int) -> Plan:
        made_by = {"criterion": criterion, "seed": seed}
        return plan_kernels(
            self.model, self.example, self.scores(criterion, seed), ratio=ratio, made_by=made_by
        )

    def where(self, criterion: str, ratio: float, seed: int) -> dict[str, Any]:
        """Say which convolutions lose the kernels, by the last part of their names, and how large the files become."""
        plan, removed, kernels = self.plan(criterion, ratio, seed), Counter[str](), Counter[str]()
        for removal in plan.removals:
            name = removal.layer.rpartition(".")[2]
            removed[name] += len(removal.indices)
            kernels[name] += math.prod(self.model.get_submodule(removal.layer).weight.shape[:2])
        with tempfile.TemporaryDirectory() as folder:
            sizes = [
                (save_pruned(model, Path(folder) / name) / WEIGHTS).stat().st_size
                for name, model in (("dense", self.model), ("pruned", plan.apply(copy.deepcopy(self.model))))
            ]
        return {
            "removed": {name: round(removed[name] / kernels[name], 4) for name in kernels},
            "file_size": round(sizes[1] / sizes[0], 4),
        }

    def medians(self) -> dict[str, dict[str, float]]:
        """Return the median strength and the median norm of each convolution's kernels."""
        found = {}
        for name, strengths in kernel_scores(self.model, self.example).items():
            norms = self.model.get_submodule(name).weight.detach().flatten(2).norm(dim=2)
            found[name] = {"strength": float(strengths.abs().median()), "norm": float(norms.median())}
        return {name: {key: round(x, 5) for key, x in both.items()} for name, both in found.items()}

    def scores(self, criterion: str, seed: int) -> dict[str, Tensor]:
        if criterion == "synaptic_strength":
            return kernel_scores(self.model, self.example)
        generator = torch.Generator().manual_seed(seed)
        convolutions = {n: m.weight for n, m in self.model.named_modules() if isinstance(m, nn.Conv2d)}
        if criterion == "mean_magnitude":
            return {n: weight.detach().abs().mean(dim=(2, 3)) for n, weight in convolutions.items()}
        return {n: torch.rand(weight.shape[:2], generator=generator) for n, weight in convolutions.items()}


def top1(model: nn.Module, data: ImageData) -> float:
    return round(evaluate(model, data.test).top1, 2)


def mean(result: dict[str, Any], criterion: str, ratio: float, stage: str) -> float:
    """Average over the seeds."""
    values = [row[stage] for row in result["rows"] if (row["criterion"], row["ratio"]) == (criterion, ratio)]
    return float(sum(values) / len(values))


def markdown(result: dict[str, Any]) -> str:
    """Arrange the results as one table for each stage."""
    lines = [f"dense: {result['dense_top1']:.2f} %", ""]
    labels = " | ".join(CRITERIA.values()).replace("|w|", r"\|w\|")
    for stage, title in STAGES.items():
        if stage == "finetuned":
            title = f"fine-tuned for {result['epochs']} epoch{'s' * (result['epochs'] > 1)}"
        lines += [
            f"top-1, {title}",
            "",
            f"| sparsity | {labels} |",
            "|---|---|---|---|",
        ]
        for ratio in result["ratios"]:
            cells = [f"{mean(result, name, ratio, stage):.2f}" for name in CRITERIA]
            lines.append(f"| {100 * ratio:g} % | {' | '.join(cells)} |")
        lines.append("")
    lines += [
        "removed of the convolutions of each name, and the size of the weights' file",
        "",
        f"| sparsity | {labels} |",
        "|---|---|---|---|",
    ]
    for ratio in result["ratios"]:
        rows = {row["criterion"]: row for row in result["rows"] if row["ratio"] == ratio and row["seed"] == 0}
        cells = [
            ", ".join(f"{name} {100 * x:.0f} %" for name, x in rows[criterion]["removed"].items())
            + f"; {rows[criterion]['file_size']:.2f}"
            for criterion in CRITERIA
        ]
        lines.append(f"| {100 * ratio:g} % | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw accuracy over sparsity beside the results, at once (dashed) and fine-tuned."""
    curves = {
        f"{label}, {STAGES[stage]}": [(r, mean(result, name, r, stage)) for r in result["ratios"]]
        for stage in ("finetuned", "top1")
        for name, label in CRITERIA.items()
    }
    plot_kernels(
        curves,
        path.with_suffix(""),
        across="top-1 on the test images (%)",
        title=f"{result['model']}, kernels removed by one threshold",
        level=("dense", result["dense_top1"]),
        dashed=[label for label in curves if label.endswith(STAGES["top1"])],
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
    parser.add_argument("--ratios", type=floats, default=(0.5, 0.6, 0.7, 0.8, 0.9))
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/kernel_accuracy"), help="measured already")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernel_accuracy.json"))
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
    dense = bench.dense()
    rows = [
        bench.cell(name, ratio, seed) | bench.where(name, ratio, seed)
        for ratio in args.ratios
        for name in CRITERIA
        for seed in range(args.seeds)
    ]
    result = {
        "model": args.model, "ratios": list(args.ratios), "epochs": args.epochs, "seeds": args.seeds,
        "learning_rate": args.learning_rate, "test_images": len(bench.data.test), "dense_top1": dense, "rows": rows,
        "medians": bench.medians(),
        **here(),
        "command": command(),
    }  # fmt: skip
    write_json(args.out, result)
    print(markdown(result))
    plot(result, args.out)


if __name__ == "__main__":
    main()
