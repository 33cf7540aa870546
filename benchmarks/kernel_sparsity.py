"""How much faster networks that have lost kernels run, beside what their operations would allow.

    python benchmarks/kernel_sparsity.py --weights vgg16_bn.safetensors --out benchmarks/results/kernel_sparsity.json
    python benchmarks/kernel_sparsity.py --table benchmarks/results/kernel_sparsity.json    # as Markdown

First the layers: every 3x3 convolution of VGG-16 and of ResNet-18 on 32x32 images, with kernels removed at random, in
each backend, timed in turns with dense. The theoretical ratio is the share of live kernels. Then VGG-16 as a whole,
compiled with ``compile_sparse``: once with every convolution (but the first) at the same random sparsity, once, with
``--weights``, with the kernels of a trained network removed by one threshold on their synaptic strength. Each backend's
multiplications a second tell what limits it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import command, floats, here, ints
from torch import nn

from dscore_plugin.files import read_json, write_json
from dscore_plugin.integrations.torch_pruning.synaptic import kernel_scores
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.report.kernel_numbers import kernel_numbers
from dscore_plugin.selection.kernels import plan_kernels
from dscore_plugin.surgery.kernels import prune_kernels
from dscore_plugin.surgery.native import has_compiler
from dscore_plugin.surgery.sparse_backends import BACKENDS, usable_backends
from dscore_plugin.surgery.sparse_execution import _fastest, compile_sparse

# (inputs, outputs, width of the input map, stride); those that several networks share stand once
SHAPES = (
    (64, 64, 32, 1), (64, 128, 16, 1), (128, 128, 16, 1), (128, 256, 8, 1), (256, 256, 8, 1), (256, 512, 4, 1),
    (512, 512, 4, 1), (512, 512, 2, 1), (64, 128, 32, 2), (128, 256, 16, 2), (256, 512, 8, 2),
)  # fmt: skip
WITHOUT = "without a compiler"
BOUND_SPARSITY, BOUND = 0.96, 2.0


def layer(shape: tuple[int, int, int, int], sparsity: float, batch: int, rounds: int) -> dict[str, Any]:
    """Time one layer in each backend."""
    inputs, outputs, width, stride = shape
    torch.manual_seed(0)
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False).eval()
    mask = torch.rand(outputs, inputs) >= sparsity
    convolution.weight.data *= mask[..., None, None]
    x = torch.randn(batch, inputs, width, width)
    with torch.no_grad():
        choice, _ = _fastest(convolution, usable_backends(convolution), x, rounds)
    macs = convolution.weight.numel() * (width // stride) ** 2 * batch
    work = {name: macs * (1 if name == "dense" else choice.live) for name in choice.milliseconds}
    return {
        "shape": list(shape), "batch": batch, "sparsity": sparsity, "theoretical": round(choice.live, 4),
        "chosen": choice.backend, "milliseconds": choice.milliseconds,
        "ratio": round(choice.milliseconds[choice.backend] / choice.milliseconds["dense"], 4),
        "gmacs_per_s": {n: round(work[n] / ms / 1e6, 2) for n, ms in choice.milliseconds.items()},
    }  # fmt: skip


def whole(model: nn.Module, how: str, sparsity: float, batch: int, rounds: int) -> dict[str, Any]:
    """Time a whole network, dense and compiled."""
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 32, 32)
    backends = [name for name in BACKENDS if name != "native" or not how.endswith(WITHOUT)]
    compiled = compile_sparse(model, (x,), backends=backends, rounds=rounds)
    with torch.no_grad():
        expected = model(x)
        error = float((compiled(x) - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    macs = kernel_numbers(model, x[:1])["macs"]
    chosen = [choice.backend for choice in compiled.choices.values()]
    return {
        "model": "cifar_vgg16_bn", "how": how, "sparsity": sparsity, "batch": batch,
        "dense_ms": round(1e3 * compiled.dense_seconds, 3), "sparse_ms": round(1e3 * compiled.sparse_seconds, 3),
        "times_faster": round(compiled.dense_seconds / compiled.sparse_seconds, 3),
        "theoretical": round(macs["physical"] / macs["effective"], 3), "largest_error": error,
        "backends": {name: chosen.count(name) for name in sorted(set(chosen))},
    }  # fmt: skip


def uniform(sparsity: float) -> nn.Module:
    """Build VGG-16, every convolution but the first at the same random sparsity."""
    torch.manual_seed(0)
    model = create_model("cifar_vgg16_bn").eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)][1:]
    shapes = {name: model.get_submodule(name).weight.shape[:2] for name in names}
    return prune_kernels(model, {name: torch.rand(shape) >= sparsity for name, shape in shapes.items()})


def trained(weights: Path, sparsity: float) -> nn.Module:
    """Load VGG-16 and remove its weakest kernels by one threshold."""
    model, example = create_model("cifar_vgg16_bn").eval(), (torch.zeros(1, 3, 32, 32),)
    load_weights(model, weights)
    plan = plan_kernels(model, example, kernel_scores(model, example), ratio=sparsity, made_by={})
    return plan.apply(model, example)


def markdown(result: dict[str, Any]) -> str:
    """Arrange the results as tables: time as a part of dense, the theoretical part in brackets."""
    lines = []
    for batch in result["batches"]:
        rows = [row for row in result["layers"] if row["batch"] == batch]
        shares = result["sparsities"]
        lines += [f"layers, batch {batch}: time / dense time (chosen backend)", ""]
        lines += [f"| layer | {' | '.join(f'{s:.0%}' for s in shares)} |", "|---" * (len(shares) + 1) + "|"]
        for shape in SHAPES:
            cells = [
                f"{row['ratio']:.2f} ({row['chosen']})"
                for s in shares
                for row in rows
                if (tuple(row["shape"]), row["sparsity"]) == (shape, s)
            ]
            inputs, outputs, width, stride = shape
            lines.append(f"| {inputs} to {outputs}, {width}x{width}, stride {stride} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["| VGG-16 as a whole | sparsity | batch | dense (ms) | sparse (ms) | faster | by operations |"]
    lines += ["|---" * 7 + "|"]
    for row in result["whole"]:
        lines.append(
            f"| {row['how']} | {row['sparsity']:.0%} | {row['batch']} | {row['dense_ms']:.1f} | "
            f"{row['sparse_ms']:.1f} | {row['times_faster']:.2f}x | {row['theoretical']:.2f}x |"
        )
    return "\n".join(
        [*lines, "", *(f"{'ok  ' if met else 'MISS'}  {b}" for b, met in result["within_bounds"].items())]
    )


def bounds(result: dict[str, Any]) -> dict[str, bool]:
    """Say which of the promises hold."""
    at_bound = [r for r in result["whole"] if r["sparsity"] == BOUND_SPARSITY and r["how"] == "uniform"]
    return {
        f"VGG-16 at {BOUND_SPARSITY:.0%} at least {BOUND:g} x faster": all(
            row["times_faster"] >= BOUND for row in at_bound
        ),
        "no layer slower than dense by more than 5 %": all(row["ratio"] <= 1.05 for row in result["layers"]),
        "outputs within 1e-4": all(row["largest_error"] <= 1e-4 for row in result["whole"]),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, help="safetensors of a trained cifar_vgg16_bn")
    parser.add_argument("--table", type=Path, help="print these results as Markdown, and measure nothing")
    parser.add_argument("--sparsities", type=floats, default=(0.5, 0.7, 0.8, 0.9, 0.96, 0.97))
    parser.add_argument("--batches", type=ints, default=(1, 64))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.table:
        print(markdown(read_json(args.table)))
        return 0
    torch.set_num_threads(args.threads)
    layers, wholes = [], []
    for batch in args.batches:
        for sparsity in args.sparsities:
            models = {"uniform": uniform(sparsity)}
            models[f"uniform, {WITHOUT}"] = models["uniform"]
            if args.weights:
                models["synaptic strength"] = trained(args.weights, sparsity)
            for how, model in models.items():
                wholes.append(whole(model, how, sparsity, batch, args.rounds))
                print(f"{time.strftime('%H:%M:%S')} {wholes[-1]}", file=sys.stderr, flush=True)
            layers += [layer(shape, sparsity, batch, args.rounds) for shape in SHAPES]
    result: dict[str, Any] = {
        "sparsities": list(args.sparsities), "batches": list(args.batches), "layers": layers, "whole": wholes,
        "rounds": args.rounds, "compiler": has_compiler(), **here(),
        "command": command(),
    }  # fmt: skip
    result["within_bounds"] = bounds(result)
    print(markdown(result))
    if args.out:
        write_json(args.out, result)
    return 0 if all(result["within_bounds"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
