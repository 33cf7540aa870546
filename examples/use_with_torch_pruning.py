"""D-Score inside Torch-Pruning: its importance passed to a pruner, and nothing else of this package.

Run ``python examples/use_with_torch_pruning.py``, or with ``--model mobilenetv2_100 --ratio 0.3 --global-pruning``.
"""

from __future__ import annotations

import argparse

import timm
import torch
import torch_pruning as tp

from dscore_plugin import DScoreImportance


def main() -> None:
    """Prune a network with random weights and print what is left of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet18", help="name in timm's registry")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the channels to remove")
    parser.add_argument(
        "--global-pruning", action="store_true", help="rank the channels of all layers together"
    )
    arguments = parser.parse_args()

    model = timm.create_model(arguments.model)  # add pretrained=True for a trained one
    x = torch.randn(1, 3, 224, 224)
    macs, params = tp.utils.count_ops_and_params(model, x)

    tp.BasePruner(
        model,
        x,
        importance=DScoreImportance(),
        pruning_ratio=arguments.ratio,
        global_pruning=arguments.global_pruning,
        ignored_layers=[model.get_classifier()],
    ).step()

    macs_left, params_left = tp.utils.count_ops_and_params(model, x)
    print(f"{arguments.model}, {arguments.ratio:.0%} of the channels removed")
    print(f"MACs       {macs / 1e6:10.1f} M -> {macs_left / 1e6:10.1f} M ({macs_left / macs:.1%} left)")
    print(
        f"parameters {params / 1e6:10.2f} M -> {params_left / 1e6:10.2f} M ({params_left / params:.1%} left)"
    )
    assert model(x).shape == (1, 1000)


if __name__ == "__main__":
    main()
