"""What sparsity training is worth: a network that was trained for its pruning beside one that was not.

ResNet-20 goes on training from its weights, with the controller; it is then pruned to the target by one threshold.
Beside it, at the same MACs: the same weights pruned post hoc by the same score, and (with --control) the same training
without a penalty, pruned post hoc. Every top-1 is on the test images, of the last epoch, without fine-tuning; the one
after "recalibrated" has seen 2,048 training images to measure batch norm's statistics again.

    python benchmarks/dependency_aware.py --data cifar10:PATH --weights resnet20.safetensors --control \\
        --out benchmarks/results/dependency_aware.json

The paper trains 160 epochs from random weights; its step of lambda is scaled to the epochs given (see
docs/dependency_aware.md). The picture of the trajectory is written beside the JSON. An interrupted run goes on where it
was when the same command is given again.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import here
from torch import nn

from dscore_plugin.bench.hardware import hardware_name
from dscore_plugin.datasets import ImageSet, load_data
from dscore_plugin.files import write_json
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.integrations.torch_pruning.links import scored_layers
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.plan import Plan
from dscore_plugin.planning import plan_pruning
from dscore_plugin.report.plots import plot_sparsity
from dscore_plugin.sparse_training import paper_schedule, plan_sparsity
from dscore_plugin.training.evaluation import evaluate, recalibrate_batchnorm
from dscore_plugin.training.loop import train
from dscore_plugin.training.progress import RichProgress
from dscore_plugin.training.sparsity import DependencyAwareRegularizer

TOLERANCE = 0.05  # of the sparsity reached, around its target
CRITERION = "dependency_aware"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--delta", type=float, help="step of lambda; default: the paper's, scaled")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="constant; the paper's is 0.1")
    parser.add_argument("--images", type=int, help="of training and of test, for a quick look")
    parser.add_argument("--control", action="store_true", help="train once more, without the penalty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def numbers(model: nn.Module, plan: Plan, example: torch.Tensor, images: ImageSet, test: ImageSet) -> Any:
    """Prune a copy, and measure it before and after batch norm's statistics are."""
    row: dict[str, Any] = {"top1_dense": evaluate(model, test).top1}
    pruned = plan.apply(copy.deepcopy(model), (example,))
    row |= {"top1_pruned": evaluate(pruned, test).top1}
    recalibrate_batchnorm(pruned, images.plain())
    row |= {"top1_recalibrated": evaluate(pruned, test).top1}
    widths = {r.layer: len(r.channels) for r in plan.removals}
    return row | {
        "macs_kept": plan.macs[1] / plan.macs[0],
        "params_kept": plan.params[1] / plan.params[0],
        "removed": widths,
    }


def main() -> int:
    options = arguments()
    data = load_data(options.data, seed=options.seed)
    images, test = data.train, data.test
    if options.images:
        images, test = images.subset(options.images), test.subset(options.images)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dense = create_model(options.model, num_classes=data.num_classes, in_chans=data.input_shape[0]).to(device)
    load_weights(dense, options.weights)
    example = torch.zeros(1, *data.input_shape, device=device)
    config, _ = paper_schedule(
        options.epochs, learning_rate=options.learning_rate, seed=options.seed, validate_every=options.epochs
    )
    work = options.out.with_name(options.out.stem + ".work")

    def trained(name: str, regularizer: DependencyAwareRegularizer | None) -> tuple[nn.Module, Any]:
        model = copy.deepcopy(dense)
        history = train(
            model, images, None, config, checkpoint=work / name, resume=True, regularizer=regularizer,
            progress=RichProgress(),
        )  # fmt: skip
        return model, history

    layers = scored_layers(PruningGraph(dense, (example,)))
    regularizer = DependencyAwareRegularizer(
        dense, layers, options.target, options.epochs, delta=options.delta
    )
    sparse, history = trained("sparse", regularizer)
    plan, choice = plan_sparsity(sparse, (example,), options.target)
    rows = {"sparsity training": numbers(sparse, plan, example, images, test)}
    alike = {
        "target_macs": plan.macs[1] / plan.macs[0],
        "allocation": "global",
        "layers": "inner",
        "min_channels": 8,
    }
    others = {"post hoc, no training": dense}
    if options.control:
        others["trained without penalty, post hoc"] = trained("control", None)[0]
    for name, model in others.items():
        rows[name] = numbers(model, plan_pruning(model, example, CRITERION, **alike), example, images, test)
    trajectory = [record.regularizer for record in history.history]
    reached = trajectory[-1]["sparsity"]
    result = {
        "model": options.model,
        "data": f"{data.name}, {len(images):,} training and {len(test):,} test images",
        "target": options.target,
        "epochs": options.epochs,
        "delta": regularizer.controller.delta,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "reached": reached,
        "within": abs(reached - options.target) <= TOLERANCE,
        "threshold": choice["threshold"],
        "share_removed": choice["removed"],
        "trajectory": trajectory,
        "rows": rows,
        "machine": {
            **here(),
            "device": hardware_name(device),
        },
    }
    write_json(options.out, result)
    plot_sparsity(trajectory, options.out.with_suffix(""))
    shutil.rmtree(work)
    for name, row in rows.items():
        print(
            f"{name}: top-1 {row['top1_dense']:.2f} -> {row['top1_pruned']:.2f} (recalibrated "
            f"{row['top1_recalibrated']:.2f}), MACs kept {row['macs_kept']:.1%}"
        )
    print(
        f"sparsity {reached:.1%} of {options.target:.0%}: {'within' if result['within'] else 'NOT within'} 5 points"
    )
    return 0 if result["within"] else 1


if __name__ == "__main__":
    sys.exit(main())
