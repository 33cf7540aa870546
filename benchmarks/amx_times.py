"""A training step with the kernels for CPUs with AMX, against PyTorch's own, and what each errs against float32.

Both take their steps in turns, on one thread, batch 128; a network pruned by half of its channels, and the dense one.
The errors are those of one step's gradients, ``|g - g32| / |g32|``, the mean over the parameters.

    python benchmarks/amx_times.py --out benchmarks/results/amx_times.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from amx import fast_training
from measuring import command, floats, here
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin import prune
from dscore_plugin.files import write_json
from dscore_plugin.models import create_model

_BATCH = 128


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="cifar_resnet20,cifar_resnet56,cifar_vgg16_bn")
    parser.add_argument("--ratios", type=floats, default=(0.0, 0.5), help="channels that are pruned by L1")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/amx_times.json"))
    return parser.parse_args()


class Training:
    """A network in training, with these kernels or without, in bfloat16 or float32."""

    def __init__(self, model: nn.Module, fast: bool, bfloat16: bool = True) -> None:
        self.model = copy.deepcopy(model).train().to(memory_format=torch.channels_last)
        self.fast, self.bfloat16 = fast, bfloat16
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def gradients(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with fast_training() if self.fast else nullcontext():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bfloat16):
                logits = self.model(images)
            functional.cross_entropy(logits.float(), labels).backward()
        return {name: parameter.grad for name, parameter in self.model.named_parameters()}

    def seconds(self, images: Tensor, labels: Tensor) -> float:
        began = time.perf_counter()
        self.gradients(images, labels)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return statistics.mean(
        float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted
    )


def row(name: str, ratio: float, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    images, labels = torch.randn(_BATCH, 3, 32, 32), torch.randint(10, (_BATCH,))
    images = images.contiguous(memory_format=torch.channels_last)
    model = create_model(name)
    if ratio:
        model = prune(model, images[:1], "l1", ratio=ratio)
    exact = Training(model, fast=False, bfloat16=False).gradients(images, labels)
    kinds = {"pytorch": Training(model, fast=False), "amx": Training(model, fast=True)}
    errors = {kind: round(error(run.gradients(images, labels), exact), 4) for kind, run in kinds.items()}
    for run in kinds.values():
        run.optimizer.zero_grad()
        run.seconds(images, labels)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(steps):
        for kind, run in kinds.items():
            times[kind].append(run.seconds(images, labels))
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    return {
        "model": name,
        "ratio": ratio,
        "ms": {kind: round(1000 * seconds, 1) for kind, seconds in medians.items()},
        "faster": round(medians["pytorch"] / medians["amx"], 2),
        "gradient_error": errors,
    }


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    rows = []
    for name in args.models.split(","):
        for ratio in args.ratios:
            rows.append(row(name, ratio, args.steps))
            print(rows[-1], flush=True)
    write_json(args.out, {"command": command(), **here(), "batch": _BATCH, "rows": rows})


if __name__ == "__main__":
    main()
