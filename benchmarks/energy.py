"""How long energy statistics take to score every layer of ResNet-56, in what memory, and how dcor compares.

All 27 residual branches, 5,184 training images of CIFAR-10, one round, as the pruning does it: forward passes included,
loading of data and weights not. Then, in the same run and on the same feature maps, this package and dcor compute the
energy distance of the two most frequent classes. Only that, and for a few branches: dcor takes half a minute and more
for one distance, a branch needs nine of them, and there are 27 branches.

    python benchmarks/energy.py --data cifar10:PATH --weights FOLDER --out benchmarks/results/energy.json
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dcor
import torch
from measuring import command, here
from torch import Tensor, nn

from dscore_plugin.criteria.energy import energy_distance
from dscore_plugin.datasets import ImageData, load_data
from dscore_plugin.files import write_json
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.selection.energy import EnergySelector
from dscore_plugin.selection.feature_maps import divide, feature_map_sizes, feature_maps
from dscore_plugin.selection.selector import Request
from dscore_plugin.surgery.layers import find_branches
from dscore_plugin.training.progress import NoProgress, RichProgress

BOUNDS = {"seconds": 120, "peak_gib": 4.0, "ratio_to_dcor": 10}
MODEL = "cifar_resnet56"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="cifar10:PATH")
    parser.add_argument("--weights", type=Path, required=True, help="folder with resnet56.safetensors")
    parser.add_argument("--images", type=int, default=5184)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--branches", default="layer1.4,layer2.4,layer3.4", help="that dcor looks at")
    parser.add_argument("--out", type=Path, help="write the result here, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = create_model(MODEL).eval()
    load_weights(model, arguments.weights / "resnet56.safetensors")
    data = load_data(arguments.data)
    data.train.plain()[0]  # decodes the images
    before = peak_gib()
    selector = EnergySelector(selection_images=arguments.images)
    busy = time.process_time()
    scores, seconds = score(selector, model, data)
    busy = time.process_time() - busy
    result: dict[str, Any] = {
        "model": MODEL, "branches": len(scores), "images": arguments.images, "passes": passes(selector, model),
        "seconds": round(seconds, 1), "cpu_seconds": round(busy, 1),
        "peak_gib": round(peak_gib(), 2), "peak_before_gib": round(before, 2),
        "scores": {name: round(value, 5) for name, value in scores.items()},
    }  # fmt: skip
    print(result, flush=True)
    rows = compare(selector, model, data, arguments.branches.split(","))
    result["dcor"] = rows
    result["ratio_to_dcor"] = min(row["ratio"] for row in rows)
    result["within_bounds"] = (
        result["seconds"] < BOUNDS["seconds"]
        and result["peak_gib"] < BOUNDS["peak_gib"]
        and result["ratio_to_dcor"] >= BOUNDS["ratio_to_dcor"]
    )
    result |= {
        "bounds": BOUNDS, **here(),
        "dcor_version": dcor.__version__, "command": command(),
    }  # fmt: skip
    print({key: value for key, value in result.items() if key != "scores"})
    if arguments.out:
        write_json(arguments.out, result)
    return 0 if result["within_bounds"] else 1


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def example() -> tuple[Tensor]:
    return (torch.zeros(1, 3, 32, 32),)


def passes(selector: EnergySelector, model: nn.Module) -> int:
    sizes = feature_map_sizes(model, example(), [branch.output for branch in find_branches(model)])
    return len(divide(sizes, selector.selection_images, selector.memory_limit))


def score(selector: EnergySelector, model: nn.Module, data: ImageData) -> tuple[dict[str, float], float]:
    request = Request(example(), "layer", "keep_layers", 17, 0, None, RichProgress(), print, *[unused] * 4)  # type: ignore[arg-type]
    start = time.perf_counter()
    scores = selector.scores(model, data, request, find_branches(model))
    return scores, time.perf_counter() - start


def unused(*_: Any) -> None:
    raise AssertionError("layers need no graph of channels")


def compare(
    selector: EnergySelector, model: nn.Module, data: ImageData, names: list[str]
) -> list[dict[str, Any]]:
    """Time both on the feature maps of a few branches, and check that they agree."""
    rows = []
    images = data.train.plain().subset(selector.selection_images, seed=0)
    outputs = {branch.name: branch.output for branch in find_branches(model)}
    for name in names:
        sizes = feature_map_sizes(model, example(), [outputs[name]])
        (part,) = feature_maps(model, images, sizes, progress=NoProgress())
        x, y = two_classes(part.values, part.predicted)
        # dcor may form every difference of two maps at once: as many images as that leaves in 2 GiB
        fit = math.isqrt(2**28 // x.shape[1])
        x, y = x[:fit], y[:fit]
        arrays = x.double().numpy(), y.double().numpy()
        ours, our_seconds = timed(lambda x=x, y=y: energy_distance(x, y))
        theirs, their_seconds = timed(lambda arrays=arrays: float(dcor.energy_distance(*arrays)))
        row = {
            "branch": name, "elements": x.shape[1], "images": [len(x), len(y)], "ours_seconds": round(our_seconds, 3),
            "dcor_seconds": round(their_seconds, 1), "ratio": round(their_seconds / our_seconds, 1),
            "relative_difference": abs(ours - theirs) / theirs,
        }  # fmt: skip
        print(row, flush=True)
        rows.append(row)
    return rows


def two_classes(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The maps of the two most frequent classes."""
    first, second = torch.argsort(torch.bincount(labels), descending=True, stable=True)[:2]
    return features[labels == first], features[labels == second]


def timed(call: Callable[[], float]) -> tuple[float, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
