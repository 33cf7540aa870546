"""What the discrimination-aware loss is worth: top-1 before fine-tuning, for several lambdas, beside L1 and Random.

ResNet-56 loses the same share of the inputs of every block's second convolution, chosen by DCP with different lambdas
(0 is reconstruction alone), by L1 and at random: the same MACs in every row. DCP optimises the layers on the way, on
the selection images; L1 and Random only remove. Every row is measured again after batch norm's statistics were taken
anew from 2,048 training images ("recalibrated"), which helps those that did not optimise anything.

    python benchmarks/dcp_accuracy.py --data cifar10:PATH --weights resnet56.safetensors \\
        --out benchmarks/results/dcp_accuracy.json

An interrupted run goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
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
from dscore_plugin.planning import plan_pruning, selection_request
from dscore_plugin.selection.discrimination_aware import DiscriminationAwareSelector
from dscore_plugin.training.evaluation import evaluate, recalibrate_batchnorm
from dscore_plugin.training.progress import RichProgress


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--model", default="cifar_resnet56")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.1, 1.0])
    parser.add_argument("--images", type=int, default=1024, help="to choose by")
    parser.add_argument("--channels-per-step", type=int, default=1)
    parser.add_argument("--head-epochs", type=int, default=0)
    parser.add_argument("--test-images", type=int, help="for a quick look")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def pruned(
    name: str, model: nn.Module, data: ImageData, rate: float, work: Path, options: argparse.Namespace
) -> Plan:
    """Prune a network in place by one method; the same groups and counts for all."""
    example = (torch.zeros(1, *data.input_shape),)
    if not name.startswith("dcp"):
        plan = plan_pruning(model, example, name, ratio=rate, layers="inner", seed=options.seed)
    else:
        selector = DiscriminationAwareSelector(
            strength=float(name.split()[-1]), selection_images=options.images, head_epochs=options.head_epochs,
            channels_per_step=options.channels_per_step,
        )  # fmt: skip
        request = selection_request(
            example,
            "channel",
            "ratio",
            rate,
            layers="inner",
            seed=options.seed,
            work=work,
            progress=RichProgress(),
        )
        plan = selector.select(model, data, request)
    plan.apply(model, example)
    return plan


def row(
    name: str, rate: float, dense: nn.Module, data: ImageData, work: Path, options: argparse.Namespace
) -> dict[str, Any]:
    model, began = copy.deepcopy(dense), time.perf_counter()
    plan = pruned(name, model, data, rate, work, options)
    seconds = time.perf_counter() - began
    test = data.test if options.test_images is None else data.test.subset(options.test_images)
    train = data.train.plain().subset(min(options.test_images or 5000, len(data.train)), seed=1)
    result = {
        "method": name,
        "rate": rate,
        "macs": plan.macs,
        "params": plan.params,
        "top1": evaluate(model, test).top1,
        "train_top1": evaluate(model, train).top1,
        "seconds": seconds,
    }
    recalibrate_batchnorm(model, data.train.plain())
    return result | {"recalibrated_top1": evaluate(model, test).top1}


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    data = load_data(options.data, seed=options.seed)
    dense = create_model(options.model, num_classes=data.num_classes, in_chans=data.input_shape[0])
    load_weights(dense, options.weights)
    work = options.out.with_name(options.out.stem + ".work")
    work.mkdir(parents=True, exist_ok=True)
    settings = {
        key: value for key, value in vars(options).items() if key not in ("out", "data", "weights", "threads")
    }
    kept = (
        read_json(work / "rows.json") if (work / "rows.json").exists() else {"settings": settings, "rows": []}
    )
    if kept["settings"] != settings:
        print(f"{work} holds a run with other options; remove it, or give another --out", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = kept["rows"]
    names = ["l1", "random", *(f"dcp, lambda {strength:g}" for strength in options.strengths)]
    for rate in options.rates:
        for name in names:
            if any(r["method"] == name and r["rate"] == rate for r in rows):
                continue
            rows.append(row(name, rate, dense, data, work / f"{rate:g} {name}", options))
            write_json(work / "rows.json", {"settings": settings, "rows": rows})
            print({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    test = data.test if options.test_images is None else data.test.subset(options.test_images)
    result = {
        "model": options.model,
        "data": f"{data.name}, {options.images:,} images to choose by, {len(test):,} test images",
        "dense_top1": evaluate(dense, test).top1,
        "rows": rows,
        "in_order": {f"{rate:g}": _in_order(rows, rate) for rate in options.rates},
        **settings,
        **here(),
        "command": command(),
    }
    write_json(options.out, result)
    shutil.rmtree(work)
    return 0


def _in_order(rows: list[dict[str, Any]], rate: float) -> bool:
    """Whether every positive lambda is better than reconstruction alone, as in the paper's Table 6."""
    top1 = {r["method"]: r["top1"] for r in rows if r["rate"] == rate}
    alone = top1.get("dcp, lambda 0")
    joint = [value for name, value in top1.items() if name.startswith("dcp") and name != "dcp, lambda 0"]
    return alone is not None and all(value > alone for value in joint)


if __name__ == "__main__":
    sys.exit(main())
