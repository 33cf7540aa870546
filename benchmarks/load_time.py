"""How long a pruned ResNet-50 takes to load, beside building and loading the dense one.

Both start from files in the page cache and end with a model in memory that is ready to run. The two loads take
turns, so that what else the machine does meets both alike; the result is the ratio of their medians.

    python benchmarks/load_time.py --out benchmarks/results/load_time.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch_pruning as tp
from measuring import here
from safetensors.torch import load_file, save_file
from torch import nn

from dscore_plugin import load_pruned, save_pruned
from dscore_plugin.files import write_json

BOUND = 1.2  # times building and loading the dense model


def load_dense(name: str, weights: Path) -> nn.Module:
    model = timm.create_model(name)
    model.load_state_dict(load_file(weights))
    return model.eval()


def prepare(name: str, folder: Path, ratio: float) -> dict[str, Callable[[], nn.Module]]:
    """Save the dense weights and the pruned artifact; give the loads to be timed."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    save_file(model.state_dict(), folder / "dense.safetensors")
    pruner = tp.pruner.BasePruner(
        model,
        (torch.randn(1, 3, 224, 224),),
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=ratio,
        ignored_layers=[model.get_classifier()],
    )
    pruner.step()
    save_pruned(model, folder / "pruned", input_shape=(3, 224, 224))
    return {
        "dense": lambda: load_dense(name, folder / "dense.safetensors"),
        "pruned": lambda: load_pruned(folder / "pruned"),
    }


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(name: str, ratio: float, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        loads = prepare(name, folder, ratio)
        for load in loads.values():
            load()  # imports, caches
        times = {kind: [] for kind in loads}
        for _ in range(repeats):
            for kind, load in loads.items():
                times[kind].append(seconds(load))
        params = {kind: sum(p.numel() for p in load().parameters()) for kind, load in loads.items()}
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    quartiles = {kind: statistics.quantiles(values, n=4) for kind, values in times.items()}
    return {
        "model": name,
        "pruning_ratio": ratio,
        "params": params,
        "repeats": repeats,
        "median_ms": {kind: round(1e3 * value, 2) for kind, value in medians.items()},
        "iqr_ms": {kind: round(1e3 * (high - low), 2) for kind, (low, _, high) in quartiles.items()},
        "ratio": round(medians["pruned"] / medians["dense"], 3),
        "bound": BOUND,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50", help="name in timm's registry")
    parser.add_argument("--ratio", type=float, default=0.3, help="part of the channels that is removed")
    parser.add_argument("--repeats", type=int, default=21, help="of each load")
    parser.add_argument("--out", type=Path, help="write the result here, too")
    arguments = parser.parse_args()
    result = measure(arguments.model, arguments.ratio, arguments.repeats) | {
        **here(),
        "timm": timm.__version__,
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        write_json(arguments.out, result)
    return 0 if result["ratio"] <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
