"""Which layers to remove from ResNet-56: energy statistics against the lowest scores and against chance.

    python benchmarks/energy_accuracy.py --data cifar10:PATH --weights FOLDER
    python benchmarks/energy_accuracy.py --table benchmarks/results/energy_accuracy.json    # as Markdown

For each way to choose and each seed: 17 of the 27 residual branches stay, top-1 on the test images right after the
removal, after batch norm's statistics are measured anew, and after a short retraining. The seed draws the images that
are scored, the branches that leave by chance, and the order of the training. Cells that are measured stay in ``--out``,
and an interrupted training goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measuring import command, here
from torch import nn

from dscore_plugin.datasets import ImageData, load_data
from dscore_plugin.files import read_json, write_json
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.plan import Plan
from dscore_plugin.registry import get_criterion
from dscore_plugin.report.energy_plot import plot_energy
from dscore_plugin.selection.selector import Request
from dscore_plugin.training import RichProgress, TrainingConfig, evaluate, recalibrate_batchnorm, train

CRITERIA = ("energy", "energy_rank", "random_layers")
STAGES = ("pruned", "recalibrated", "retrained")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="cifar10:PATH")
    parser.add_argument("--weights", type=Path, help="folder with resnet56.safetensors")
    parser.add_argument("--table", type=Path, help="print these results as Markdown, and measure nothing")
    parser.add_argument("--model", default="cifar_resnet56")
    parser.add_argument("--keep", type=int, default=17, help="branches that stay")
    parser.add_argument("--criteria", default=",".join(CRITERIA))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--images", type=int, default=5184, help="that are scored")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32", "auto"))
    parser.add_argument("--train-images", type=int, help="retrain on so many only (to try the script)")
    parser.add_argument("--work", type=Path, default=Path("runs/energy_accuracy"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/energy_accuracy.json"))
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(read_json(arguments.table)))
        return
    if not (arguments.data and arguments.weights):
        parser.error("--data and --weights are needed to measure")
    data = load_data(arguments.data)
    result = read_json(arguments.out) if arguments.out.exists() else begin(arguments, data)
    settings = settings_of(arguments)
    if any(result.get(key) != value for key, value in settings.items()):
        parser.error(f"{arguments.out} was measured with other settings than {settings}; give another --out")
    done = {(cell["criterion"], cell["seed"]) for cell in result["cells"]}
    for seed in map(int, arguments.seeds.split(",")):
        for criterion in arguments.criteria.split(","):
            if (criterion, seed) not in done:
                result["cells"].append(measure(arguments, data, criterion, seed))
                write_json(arguments.out, result)
    print(markdown(result))


def dense(arguments: argparse.Namespace) -> nn.Module:
    model = create_model(arguments.model)
    load_weights(model, arguments.weights / f"{arguments.model.removeprefix('cifar_')}.safetensors")
    return model.eval()


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": arguments.model, "keep": arguments.keep, "scored_images": arguments.images,
        "epochs": arguments.epochs, "learning_rate": arguments.learning_rate, "precision": arguments.precision,
        "train_images": arguments.train_images,
    }  # fmt: skip


def begin(arguments: argparse.Namespace, data: ImageData) -> dict[str, Any]:
    return {
        **settings_of(arguments),
        "test_images": len(data.test), "top1_dense": evaluate(dense(arguments), data.test).top1,
        **here(), "command": command(), "cells": [],
    }  # fmt: skip


def choose(
    arguments: argparse.Namespace, data: ImageData, model: nn.Module, criterion: str, seed: int
) -> Plan:
    work = arguments.work / "scores" / str(seed)  # both criteria with scores read the same
    request = Request(
        (torch.zeros(1, *data.input_shape),), "layer", "keep_layers", arguments.keep, seed, work, RichProgress(), print,
        *[unused] * 4,
    )  # fmt: skip  # type: ignore[arg-type]
    selector = get_criterion(criterion).build_selector(selection_images=arguments.images)
    return selector.select(model, data, request)


def unused(*_: Any) -> None:
    raise AssertionError("layers need no graph of channels")


def measure(arguments: argparse.Namespace, data: ImageData, criterion: str, seed: int) -> dict[str, Any]:
    """Prune and retrain once."""
    model, work = dense(arguments), arguments.work / f"{criterion}-{seed}"
    plan = choose(arguments, data, model, criterion, seed)
    work.mkdir(parents=True, exist_ok=True)
    plan.save(work / "plan.json")
    if plan.made_by.get("clusters"):
        plot_energy(plan, work / "scores")
    plan.apply(model)
    top1 = {"pruned": evaluate(model, data.test).top1}
    recalibrate_batchnorm(model, data.train.plain())
    top1["recalibrated"] = evaluate(model, data.test).top1
    images = (
        data.train if arguments.train_images is None else data.train.subset(arguments.train_images, seed=seed)
    )
    config = TrainingConfig(
        arguments.epochs, learning_rate=arguments.learning_rate, precision=arguments.precision, seed=seed
    )
    start = time.monotonic()
    train(model, images, None, config, checkpoint=work / "retrain", resume=True, progress=RichProgress())
    top1["retrained"] = evaluate(model, data.test).top1
    cell = {
        "criterion": criterion, "seed": seed, "removed": [removal.layer for removal in plan.removals],
        "macs_kept": round(plan.macs[1] / plan.macs[0], 4), "params_kept": round(plan.params[1] / plan.params[0], 4),
        **{f"top1_{stage}": round(value, 2) for stage, value in top1.items()},
        "retrain_seconds": round(time.monotonic() - start),
    }  # fmt: skip
    print(cell, flush=True)
    shutil.rmtree(work / "retrain", ignore_errors=True)
    return cell


def markdown(result: dict[str, Any]) -> str:
    """Arrange the results as a table: means over the seeds, and the least and the greatest."""
    lines = [
        f"{result['model']}, {result['keep']} branches stay, {result['test_images']:,} test images, dense "
        f"{result['top1_dense']:.2f} %; {result['epochs']} epochs of retraining",
        "",
        "| criterion | MACs kept | params kept | pruned | recalibrated | retrained |",
        "|---|---|---|---|---|---|",
    ]
    for criterion in dict.fromkeys(cell["criterion"] for cell in result["cells"]):
        cells = [cell for cell in result["cells"] if cell["criterion"] == criterion]
        shares = [f"{statistics.mean(c[key] for c in cells):.1%}" for key in ("macs_kept", "params_kept")]
        tops = [spread([cell[f"top1_{stage}"] for cell in cells]) for stage in STAGES]
        lines.append(f"| `{criterion}` | {' | '.join(shares + tops)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
