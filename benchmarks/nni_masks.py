"""How far a network under NNI's masks is from the network that removing the masked channels leaves.

NNI's ``L1NormPruner`` masks the weights of a convolution; the batch norm behind it still emits ``bias - mean * weight /
std``. The first convolution of every block loses the same share of its channels; top-1 on all test images, without any
training, under NNI's masks and after the removal.

    python benchmarks/nni_masks.py --data cifar10:PATH --weights resnet20.safetensors \\
        --out benchmarks/results/nni_masks.json
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from measuring import command, here
from nni.compression.pruning import L1NormPruner
from torch import nn

from dscore_plugin.datasets import load_data
from dscore_plugin.files import write_json
from dscore_plugin.integrations.nni import speedup
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.training.evaluation import evaluate


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="cifar10:PATH")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors")
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/nni_masks.json"))
    return parser.parse_args()


def main() -> None:
    args = parse()
    data = load_data(args.data)
    model = create_model(args.model, num_classes=data.num_classes, in_chans=data.input_shape[0]).eval()
    load_weights(model, args.weights)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    first = [name for name in convolutions if name.endswith(".conv1")]
    dense = evaluate(model, data.test).top1
    pruner = L1NormPruner(model, [{"op_names": first, "sparse_ratio": args.ratio}])
    _, masks = pruner.compress()
    masked = evaluate(model, data.test).top1
    pruner.unwrap_model()
    smaller = speedup(copy.deepcopy(model), (torch.zeros(1, *data.input_shape),), masks)
    result = {
        "model": args.model,
        "ratio": args.ratio,
        "test_images": len(data.test),
        "top1": {"dense": dense, "masked": masked, "removed": evaluate(smaller, data.test).top1},
        **here(),
        "command": command(),
    }
    write_json(args.out, result)
    print(result["top1"])


if __name__ == "__main__":
    main()
