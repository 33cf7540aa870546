"""Where NNI's masks can be turned into a smaller network: our ``speedup`` beside NNI's own ``ModelSpeedup``.

Every network gets the same masks (D-Score, 40 % of the channels that can leave, norm layers randomised so that no
error hides behind zeros). Then three ways of removal run, each in a process of its own: ours, NNI's with its own
tracer, and NNI's on a graph that ``torch.fx.symbolic_trace`` has traced. A way succeeds if the smaller network runs and
computes what the network computes under the masks carried on to the consumers: the largest difference is at most 1e-4
of the largest output.

    python benchmarks/nni_speedup.py --out benchmarks/results/nni_speedup.json
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import command, here
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dscore_plugin.files import read_json, write_json
from dscore_plugin.models import create_model

MODELS = {
    "cifar_resnet56": 32, "cifar_vgg16_bn": 32, "resnet18": 32, "mobilenetv2_100": 32, "vgg11_bn": 32,
    "densenet121": 32, "resnet50": 64, "efficientnet_b0": 64, "regnety_004": 64, "convnext_atto": 64,
}  # fmt: skip
WAYS = ("dscore", "nni", "nni_fx")
TOLERANCE = 1e-4


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(name, num_classes=10)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm | nn.LayerNorm):
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) / 2)
            if isinstance(module, _BatchNorm):
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) / 3)
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
        for key, parameter in model.named_parameters():
            if key.rpartition(".")[2] == "gamma":
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def mask(model: nn.Module, inputs: tuple[Tensor, ...], x: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Give the masks, and the outputs under them when they are carried on."""
    from dscore_plugin.integrations.nni import CriterionPruner, removable_layers, set_dependency_groups

    config = [{"op_names": removable_layers(model, inputs), "sparse_ratio": 0.4}]
    pruner = CriterionPruner(model, set_dependency_groups(model, config, inputs), example_inputs=inputs)
    _, masks = pruner.compress()
    with torch.no_grad():
        expected = model(x)
    pruner.unwrap_model()
    return masks, expected


def remove(way: str, model: nn.Module, inputs: tuple[Tensor, ...], masks: dict[str, Any]) -> nn.Module:
    if way == "dscore":
        from dscore_plugin.integrations.nni import speedup

        return speedup(model, inputs, masks)
    from nni.compression.speedup import ModelSpeedup

    logger = logging.getLogger("quiet")
    logger.setLevel(logging.CRITICAL)
    graph = torch.fx.symbolic_trace(model) if way == "nni_fx" else None
    ModelSpeedup(model, inputs[0], masks, graph_module=graph, logger=logger).speedup_model()
    return model


def run_one(name: str, way: str) -> dict[str, Any]:
    from dscore_plugin.integrations.torch_pruning.counting import count

    size = MODELS[name]
    model, inputs = build(name), (torch.zeros(1, 3, size, size),)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    dense = count(model, inputs)
    masks, expected = mask(model, inputs, x)
    start = time.process_time()
    try:
        smaller = remove(way, model, inputs, masks).eval()
        seconds = time.process_time() - start
        with torch.no_grad():
            found = smaller(x)
        left = count(smaller, inputs)
    except BaseException as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        return {"ok": False, "error": f"{type(error).__name__}: {reason}"[:200]}
    difference = float((found - expected).abs().max() / expected.abs().max())
    return {
        "ok": difference <= TOLERANCE,
        "difference": float(f"{difference:.2g}"),
        "processor_seconds": round(seconds, 2),
        "macs_kept": round(left[0] / dense[0], 4),
        "params_kept": round(left[1] / dense[1], 4),
    }


def in_process(name: str, way: str, limit: int) -> dict[str, Any]:
    """Run one removal under a limit of processor time, which a busy machine does not stretch."""
    command = [sys.executable, __file__, "--one", name, way]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5)),
    )
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"ok": False, "error": f"not done after {limit} s of processor time"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {
            "ok": False,
            "error": (done.stderr.strip().splitlines() or ["ended without a word"])[-1][:200],
        }
    return json.loads(lines[-1].removeprefix("RESULT "))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument(
        "--limit",
        type=int,
        default=180,
        help="seconds of processor time for one removal, imports and masks included",
    )
    parser.add_argument("--out", type=Path, help="write the result here; what is there is kept")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print("RESULT " + json.dumps(run_one(*arguments.one)))
        return 0
    result: dict[str, Any] = {"networks": {}}
    if arguments.out and arguments.out.exists():
        result = read_json(arguments.out)
    for name in arguments.models:
        for way in WAYS:
            known = result["networks"].setdefault(name, {"pixels": MODELS[name]})
            if way not in known:
                known[way] = in_process(name, way, arguments.limit)
                print(name, way, known[way], flush=True)
                result |= versions(arguments)
                if arguments.out:
                    write_json(arguments.out, result)
    return 0 if all(network["dscore"]["ok"] for network in result["networks"].values()) else 1


def versions(arguments: argparse.Namespace) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "masks": "d_score, 40 % of the channels that can leave",
        "tolerance": TOLERANCE,
        "limit_s": arguments.limit,
        "versions": {name: version(name) for name in ("torch", "timm", "torch-pruning", "nni")},
        **here(),
        "command": command(),
    }


if __name__ == "__main__":
    sys.exit(main())
