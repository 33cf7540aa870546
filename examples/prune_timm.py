"""Prune any timm model, save it, load it again, and export it.

Run ``python examples/prune_timm.py``, or with
``--model vit_tiny_patch16_224 --ratio 0.3 --pretrained --onnx vit.onnx``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch

import dscore_plugin
from dscore_plugin.integrations.torch_pruning.counting import count


def main() -> None:
    """Prune a network, print what is left of it, and show that a saved one gives the same outputs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet18", help="name in timm's registry")
    parser.add_argument("--criterion", default="d_score", help="dscore list shows them")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the channels to remove")
    parser.add_argument("--pretrained", action="store_true", help="download trained weights")
    parser.add_argument("--out", type=Path, default=Path("pruned"), help="folder for the pruned model")
    parser.add_argument("--onnx", type=Path, help="file to export to (needs dscore-plugin[onnx])")
    arguments = parser.parse_args()

    model = timm.create_model(arguments.model, pretrained=arguments.pretrained).eval()
    shape = timm.data.resolve_model_data_config(model)["input_size"]
    x = torch.randn(1, *shape)
    before = count(model, (x,))

    dscore_plugin.prune(model, x, arguments.criterion, arguments.ratio)
    # fine-tune here: what is left is an ordinary timm model; model.reset_classifier(10) works, too

    after = count(model, (x,))
    for name, (dense, left) in zip(("MACs", "parameters"), zip(before, after, strict=True), strict=True):
        print(f"{name:10} {dense / 1e6:10.2f} M -> {left / 1e6:10.2f} M ({left / dense:.1%} left)")

    dscore_plugin.save_pruned(
        model, arguments.out, input_shape=shape, criterion=arguments.criterion, force=True
    )
    loaded = dscore_plugin.load_pruned(arguments.out)
    print(f"saved {arguments.out}; loaded outputs are equal: {torch.equal(loaded(x), model.eval()(x))}")

    if arguments.onnx:
        from dscore_plugin.export import export_model

        exported = export_model(loaded, (x,), arguments.onnx, force=True)
        print(f"{exported.path}: {exported.size / 1e6:.1f} MB, differs by {exported.difference:.1e}")


if __name__ == "__main__":
    main()
