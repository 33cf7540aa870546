"""Prune with NNI by the criteria that a config file names, train under the masks, and remove what they silence.

    pip install "dscore-plugin[nni,data]" pyyaml
    python examples/nni_select_criterion.py --config examples/nni_select_criterion.yml --out runs/nni-digits

The criteria are masks first: NNI's AGP schedule raises the ratio step by step while the network trains. The last line
of the output compares the accuracy under the masks with that of the smaller network; they are the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nni
import torch
import yaml
from nni.compression.pruning import AGPPruner
from nni.compression.utils import TorchEvaluator
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin import load_pruned, save_pruned
from dscore_plugin.datasets import load_data
from dscore_plugin.integrations.nni import CriterionPruner, set_dependency_groups, speedup
from dscore_plugin.models import create_model
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.evaluation import evaluate
from dscore_plugin.training.loop import train


def main() -> None:
    """Train a small network on scikit-learn's digits, prune it with NNI and save it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yml"))
    parser.add_argument("--epochs", type=int, default=10, help="of training the dense network")
    parser.add_argument("--steps", type=int, default=60, help="batches that the schedule trains for")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/nni-digits"), help="folder of the pruned network"
    )
    arguments = parser.parse_args()

    data = load_data("digits")
    torch.manual_seed(0)
    model = create_model("digits_cnn")
    train(model, data.train, None, TrainingConfig(epochs=arguments.epochs, learning_rate=0.1))
    print(f"dense: {evaluate(model, data.test).top1:.2f} %")

    def training_func(
        model: nn.Module, optimizers: Any, training_step: Callable[..., Tensor], schedulers: Any = None,
        max_steps: int | None = None, max_epochs: int | None = None,
    ) -> None:  # fmt: skip
        model.train()
        done = 0
        while done < (max_steps or 1):
            for batch in data.train.loader(64, shuffle=True, seed=done):
                optimizers.zero_grad()
                training_step(batch, model).backward()
                optimizers.step()
                done += 1

    def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.02, momentum=0.9)
    evaluator = TorchEvaluator(training_func, optimizer, training_step)

    inputs = (torch.zeros(1, *data.input_shape),)
    config = yaml.safe_load(arguments.config.read_text())
    config = set_dependency_groups(model, config, inputs)  # residual networks need it, this one does not
    pruner = CriterionPruner(model, config, evaluator, example_inputs=inputs)
    schedule = AGPPruner(pruner, interval_steps=arguments.steps // 6, total_times=5)
    _, masks = schedule.compress(arguments.steps, None)

    under_masks = evaluate(model, data.test).top1
    schedule.unwrap_model()
    speedup(model, inputs, masks)
    save_pruned(model, arguments.out, input_shape=data.input_shape, criterion="NNI config", force=True)
    smaller = load_pruned(arguments.out)
    widths = [module.out_channels for module in smaller.modules() if isinstance(module, nn.Conv2d)]
    print(f"channels left: {widths}; saved {arguments.out}")
    print(f"under masks: {under_masks:.2f} %, smaller network: {evaluate(smaller, data.test).top1:.2f} %")


if __name__ == "__main__":
    main()
