"""One trial: prune a trained network as NNI asks, fine-tune it briefly, and report its accuracy.

Run by NNI. Alone, ``python -m dscore_plugin.integrations.nni.experiment.trial`` prunes by the defaults.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nni
import torch
from nni.compression.utils import TorchEvaluator
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin.datasets import ImageData, load_data
from dscore_plugin.errors import BudgetError
from dscore_plugin.integrations.nni import CriterionPruner, removable_layers, set_dependency_groups, speedup
from dscore_plugin.integrations.torch_pruning.counting import count
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.registry import get_criterion
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.evaluation import evaluate
from dscore_plugin.training.loop import train

DEFAULTS = {"criterion": "d_score", "allocation": "uniform", "ratio": 0.5}
ALLOCATIONS = ("uniform", "global")


def run(parameters: Mapping[str, Any], arguments: argparse.Namespace) -> dict[str, float]:
    """Prune, fine-tune and measure.

    Args:
        parameters: ``criterion``, ``allocation`` (``"uniform"`` or ``"global"``) and ``ratio``, the share of channels
            that leaves every layer (of weights that leave the network, where it is global, as NNI counts them).
        arguments: as :func:`parser` reads them.

    Returns:
        ``default``, which NNI maximises: the accuracy on the validation images, less ``--macs-weight`` for the MACs
        that are kept; ``top1`` and ``top1_pruned``, after and before fine-tuning; ``macs_kept``, ``params_kept``.

    Raises:
        DScoreError: on bad input, before any work.
    """
    chosen = {**DEFAULTS, **parameters}
    if chosen["allocation"] not in ALLOCATIONS:
        raise BudgetError(
            f"allocation {chosen['allocation']!r} is unknown; expected one of {', '.join(ALLOCATIONS)}"
        )
    data = load_data(arguments.data, seed=arguments.seed)
    model = dense_network(arguments, data)
    inputs = (torch.zeros(1, *data.input_shape),)
    macs, params = count(model, inputs)
    prune(model, inputs, chosen, data)
    pruned = evaluate(model, data.validation.plain()).top1
    train(model, data.train, None, TrainingConfig(epochs=arguments.epochs, seed=arguments.seed))
    top1 = evaluate(model, data.validation.plain()).top1
    macs_left, params_left = count(model, inputs)
    return {
        "default": top1 - arguments.macs_weight * macs_left / macs,
        "top1": top1,
        "top1_pruned": pruned,
        "macs_kept": macs_left / macs,
        "params_kept": params_left / params,
    }


def dense_network(arguments: argparse.Namespace, data: ImageData) -> nn.Module:
    """Load the trained network, or train it where no weights are given."""
    torch.manual_seed(arguments.seed)
    model = create_model(arguments.model, num_classes=data.num_classes, in_chans=data.input_shape[0])
    if arguments.weights is not None:
        load_weights(model, arguments.weights)
    else:
        config = TrainingConfig(epochs=arguments.dense_epochs, learning_rate=0.1, seed=arguments.seed)
        train(model, data.train, None, config)
    return model


def prune(
    model: nn.Module, inputs: tuple[Tensor, ...], chosen: Mapping[str, Any], data: ImageData
) -> nn.Module:
    """Mask with NNI and remove what the masks silence, in place.

    Args:
        model: the network.
        inputs: the arguments of one forward pass.
        chosen: ``criterion``, ``allocation`` and ``ratio``.
        data: training images for criteria that look at them.

    Returns:
        ``model``.
    """
    entry = {"op_names": removable_layers(model, inputs), "sparse_ratio": float(chosen["ratio"])}
    config = [{**entry, "criterion": chosen["criterion"]}]
    if chosen["allocation"] == "global":
        config[0] |= {"global_group_id": "network", "max_sparse_ratio": 0.95}
    else:
        config = set_dependency_groups(model, config, inputs)
    evaluator = make_evaluator(model, data) if get_criterion(chosen["criterion"]).needs_data else None
    pruner = CriterionPruner(model, config, evaluator, example_inputs=inputs)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return speedup(model, inputs, masks, say=print)


def make_evaluator(model: nn.Module, data: ImageData) -> TorchEvaluator:
    """Return what NNI needs to train on ``data``: data-driven criteria gather gradients with it."""

    def training_func(
        model: nn.Module, optimizers: Any, step: Any, schedulers: Any = None,
        max_steps: int | None = None, max_epochs: int | None = None,
    ) -> None:  # fmt: skip
        model.eval()
        loader = data.train.plain().loader(128, shuffle=True)
        for _, batch in zip(range(max_steps or len(loader)), loader, strict=False):
            optimizers.zero_grad()
            step(batch, model).backward()
            optimizers.step()

    def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=1e-3)
    return TorchEvaluator(training_func, optimizer, training_step)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the arguments that a trial and the whole experiment share."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--data", default="digits", help="as for dscore prune: digits, cifar10:PATH, a folder of images"
    )
    made.add_argument("--model", default="digits_cnn", help="name in timm's registry")
    made.add_argument("--weights", type=Path, help="safetensors of the trained network")
    made.add_argument("--dense-epochs", type=int, default=20, help="of training where there are no weights")
    made.add_argument("--epochs", type=int, default=2, help="of fine-tuning")
    made.add_argument(
        "--macs-weight", type=float, default=0.0, help="points of accuracy that all of the MACs are worth"
    )
    made.add_argument("--seed", type=int, default=0)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Ask NNI for parameters, run, and report."""
    arguments = parser(__doc__).parse_args(argv)
    result = run(nni.get_next_parameter() or {}, arguments)
    print(result)
    nni.report_final_result(result)


if __name__ == "__main__":
    main()
