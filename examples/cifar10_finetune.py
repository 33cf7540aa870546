r"""Fine-tune a pruned network on CIFAR-10 (or anything else that ``dscore_plugin.datasets.load_data`` reads).

From the weights of a dense network, which is pruned first, or from an artifact:

    python examples/cifar10_finetune.py --model cifar_resnet56 --weights resnet56.safetensors \
        --criterion d_score --target-macs 0.5 --data cifar10:PATH --epochs 60 --out runs/r56
    python examples/cifar10_finetune.py --artifact runs/pruned --data cifar10:PATH --epochs 60 --out runs/r56

The same under more hardware; the batch is divided, so the result stays the same up to rounding and batch norm:

    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/cifar10_finetune.py ...      # two CPU processes
    accelerate launch --num_processes 4 --multi_gpu examples/cifar10_finetune.py ...         # four GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --node_rank 0 --master_addr HOST ... examples/cifar10_finetune.py ...

With mixed images, an average of the weights, a teacher (the dense network) and curves for TensorBoard:

    ... --mixup 0.2 --cutmix 1.0 --ema 0.999 --distill 0.9 --label-smoothing 0.1 --track tensorboard

A run that was cut off goes on with ``--resume`` and ends with the same weights. See docs/finetuning.md.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from pathlib import Path

from accelerate import PartialState
from torch import nn

from dscore_plugin import finetuning
from dscore_plugin.datasets import load_data
from dscore_plugin.errors import DScoreError
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.training import RichProgress, evaluate, train


def main() -> None:
    """Prune or load, fine-tune, measure on the test images, save."""
    arguments = parse()
    config = finetuning.read_training_options(arguments)
    work = finetuning.open_run(arguments.out, vars(arguments), force=arguments.force, resume=arguments.resume)
    data = load_data(arguments.data, seed=config.seed)
    model_args = {"num_classes": data.num_classes, "in_chans": data.input_shape[0]}

    def dense() -> nn.Module:
        model = create_model(arguments.model, **model_args)
        load_weights(model, arguments.weights)
        return model

    def pruned() -> finetuning.PrunedNetwork:
        if arguments.artifact:
            return finetuning.open_pruned(arguments.artifact)
        return finetuning.prune_network(
            dense(), data.input_shape, arguments.criterion, target_macs=arguments.target_macs,
            allocation=arguments.allocation, architecture=arguments.model, model_args=model_args,
        )  # fmt: skip

    network = finetuning.make_once(work / "pruned", pruned)
    result = train(
        network.model,
        data.train,
        data.validation,
        config,
        checkpoint=work / "training",
        resume=True,  # open_run() has seen to it that there is nothing to go on with unless --resume is given
        logs=arguments.out.with_name(arguments.out.name + ".logs"),
        teacher=dense() if config.distils else None,
        progress=RichProgress(),
    )
    state = PartialState()
    if state.is_main_process:
        top1 = evaluate(network.model.to(state.device), data.test).top1
        command = shlex.join(["python", *sys.argv])
        network.save(arguments.out, top1=top1, result=result, command=command, force=arguments.force)
        shutil.rmtree(work)
        print(f"{arguments.out}: top-1 {top1:.2f} % on {len(data.test)} test images")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", help="pruned network to begin with, instead of pruning --model")
    parser.add_argument(
        "--model", help="dense network, to be pruned and for --distill: a name in timm's registry"
    )
    parser.add_argument("--weights", type=Path, help="its weights, safetensors")
    parser.add_argument(
        "--criterion", default="d_score", help="one that looks at the weights alone (dscore list)"
    )
    parser.add_argument(
        "--target-macs", type=float, default=0.5, help="share of the MACs to keep (default 0.5)"
    )
    parser.add_argument("--allocation", default="uniform", help="uniform or global")
    parser.add_argument("--data", default="cifar10", help="cifar10[:PATH], as for dscore prune")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    finetuning.add_training_options(parser)
    arguments = parser.parse_args()
    if (arguments.artifact is None or arguments.distill or arguments.distill_features) and not (
        arguments.model and arguments.weights
    ):
        parser.error("give --model with --weights, or --artifact (and both where there is a teacher)")
    return arguments


if __name__ == "__main__":
    try:
        main()
    except DScoreError as error:
        sys.exit(f"error: {error}")
