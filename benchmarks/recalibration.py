"""Which images batch norm's statistics should be measured on: plain ones, or augmented as the network was trained.

Each network is taken dense, and with half of the MACs removed by a criterion; top-1 on all test images with the
statistics it came with, and with those of so many training images, plain and augmented.

    python benchmarks/recalibration.py --data cifar10:PATH --weights FOLDER --out benchmarks/results/recalibration.json
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from measuring import command, floats, here, ints
from torch import nn

from dscore_plugin.datasets import ImageData, load_data
from dscore_plugin.files import write_json
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.planning import plan_pruning
from dscore_plugin.training.evaluation import evaluate, recalibrate_batchnorm


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="cifar10:PATH")
    parser.add_argument(
        "--weights", type=Path, required=True, help="folder of NAME.safetensors, without 'cifar_'"
    )
    parser.add_argument("--models", default="cifar_resnet20,cifar_resnet56,cifar_vgg16_bn")
    parser.add_argument("--criterion", default="l1")
    parser.add_argument("--target-macs", type=floats, default=(0.5,))
    parser.add_argument("--images", type=ints, default=(2048,))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recalibration.json"))
    return parser.parse_args()


def row(model: nn.Module, data: ImageData, counts: tuple[int, ...]) -> dict[str, Any]:
    """Return top-1 with the network's own statistics, and with those of each kind and number of images."""

    def measured(network: nn.Module) -> float:
        return round(evaluate(network, data.test).top1, 2)

    found: dict[str, Any] = {"as it is": measured(model)}
    for kind, images in (("plain", data.train.plain()), ("augmented", data.train)):
        found[kind] = {}
        for count in counts:
            network = copy.deepcopy(model)
            recalibrate_batchnorm(network, images, count=count)
            found[kind][str(count)] = measured(network)
    return found


def main() -> None:
    args = parse()
    data, rows = load_data(args.data), []
    example = (torch.zeros(1, *data.input_shape),)
    for name in args.models.split(","):
        dense = create_model(name, num_classes=data.num_classes, in_chans=data.input_shape[0]).eval()
        load_weights(dense, args.weights / f"{name.removeprefix('cifar_')}.safetensors")
        for kept in (1.0, *args.target_macs):
            model = copy.deepcopy(dense)
            if kept < 1:
                plan_pruning(model, example, args.criterion, target_macs=kept).apply(model, example)
            rows.append({"model": name, "macs_kept": kept, **row(model, data, args.images)})
            print(rows[-1], flush=True)
    write_json(
        args.out,
        {
            "criterion": args.criterion,
            "test_images": len(data.test),
            "rows": rows,
            **here(),
            "command": command(),
        },
    )


if __name__ == "__main__":
    main()
