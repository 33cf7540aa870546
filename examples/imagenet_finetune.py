r"""Fine-tune a pruned network on ImageNet, with timm's readers and transforms, in the form the model was trained for.

The usual folders, ``IMAGENET/train/CLASS/*.JPEG`` and ``IMAGENET/val/CLASS/*.JPEG``, on eight GPUs:

    accelerate launch --multi_gpu --num_processes 8 examples/imagenet_finetune.py --model resnet50.tv_in1k \
        --layers inner --target-macs 0.4636 --data-dir IMAGENET --epochs 60 --batch-size 256 --workers 8 --out runs/r50

Or an artifact: ``--artifact runs/pruned``, with ``--model NAME.TAG`` for the form of the images where it is not that of
the architecture's default tag. Shards and the Hub, through timm's readers:

    --dataset wds/imagenet --data-dir SHARDS --train-split 'train-{0000..1023}.tar|1281167' \
        --val-split 'validation-{00..63}.tar|50000'
    --dataset hfids/timm/imagenet-1k-wds --input-key jpg --target-key cls       # streamed
    --dataset hfds/ILSVRC/imagenet-1k --val-split validation                    # downloaded, read at random

One GPU or CPU: plain ``python``. CPU processes: ``ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2``. Two machines
of eight GPUs, with ``--out`` on a disk that both see; on the second ``--machine_rank 1``:

    accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip HOST \
        --main_process_port 29500 examples/imagenet_finetune.py ...

D-Score's rows on ImageNet (arXiv 2308.04470, table 2: drops in points, reductions in per cent; its layers are all
convolutions but the last of each block, its ratios come from a sensitivity analysis, its schedule is not published):

    network    FLOPs    top-1 drop  top-5 drop   command                                              GPU hours
    ResNet-18  -23.93   0.16        0.03         --model resnet18.tv_in1k --target-macs 0.7607           6.1
               -49.24   1.76        0.96         --model resnet18.tv_in1k --target-macs 0.5076           6.1
    ResNet-34  -30.25   0.78        0.36         --model resnet34.tv_in1k --target-macs 0.6975          10.5
               -43.01   1.72        0.87         --model resnet34.tv_in1k --target-macs 0.5699          10.5
    ResNet-50  -14.78   1.23        1.01         --model resnet50.tv_in1k --target-macs 0.8522          17.5
               -53.64   1.99        1.25         --model resnet50.tv_in1k --target-macs 0.4636          17.5

all with ``--layers inner --epochs 60 --batch-size 256``. The GPU hours are an ESTIMATE, not measured: 60 passes over
1,281,167 images at the throughput that timm publishes for training the *dense* networks on one RTX 3090 with mixed
precision and channels_last (3481.78, 2036.51 and 1218.01 images/s; in its repository,
results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv), assuming that reading the images keeps up, that pruning saves
nothing, and that evaluation is free.
See docs/finetuning.md for what else may change, and for what ``--resume`` guarantees.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn

from dscore_plugin import finetuning
from dscore_plugin.errors import DScoreError
from dscore_plugin.integrations.timm.images import check_same_classes, data_form, load_images
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.training import RichProgress, train


def main() -> None:
    """Prune or load, fine-tune, evaluate the last epoch, save."""
    arguments = parse()
    config = finetuning.read_training_options(arguments)
    work = finetuning.open_run(arguments.out, vars(arguments), force=arguments.force, resume=arguments.resume)

    def dense() -> nn.Module:
        if arguments.weights is None:
            return create_model(arguments.model, num_classes=arguments.num_classes, pretrained=True)
        model = create_model(arguments.model, num_classes=arguments.num_classes)
        load_weights(model, arguments.weights)
        return model

    def pruned() -> finetuning.PrunedNetwork:
        if arguments.artifact:
            return finetuning.open_pruned(arguments.artifact)
        model = dense()
        return finetuning.prune_network(
            model, data_form(arguments.model, arguments.image_size)["input_size"], arguments.criterion,
            target_macs=arguments.target_macs, layers=arguments.layers, allocation=arguments.allocation,
        )  # fmt: skip

    network = finetuning.make_once(work / "pruned", pruned)
    form = data_form(arguments.model or network.model, arguments.image_size)
    augmentation = {"auto_augment": arguments.auto_augment} if arguments.auto_augment else {}
    reader: dict[str, Any] = {"input_key": arguments.input_key, "target_key": arguments.target_key}
    where = (arguments.dataset, arguments.data_dir)
    train_set = load_images(
        *where, arguments.train_split, form, training=True, seed=config.seed,
        augmentation=augmentation, num_samples=arguments.train_samples, **reader,
    )  # fmt: skip
    validation_set = load_images(
        *where, arguments.val_split, form, num_samples=arguments.val_samples, **reader
    )
    check_same_classes(train_set, validation_set)
    result = train(
        network.model,
        train_set,
        validation_set,
        config,
        checkpoint=work / "training",
        resume=True,  # open_run() has seen to it that there is nothing to go on with unless --resume is given
        logs=arguments.out.with_name(arguments.out.name + ".logs"),
        teacher=dense() if config.distils else None,
        progress=RichProgress(),
    )
    if PartialState().is_main_process:
        top1 = result.final.validation_top1  # of the last epoch, whether or not it is the best
        command = shlex.join(["python", *sys.argv])
        network.save(arguments.out, top1=top1, result=result, command=command, force=arguments.force)
        shutil.rmtree(work)
        print(f"{arguments.out}: top-1 {top1:.2f} % on the validation images")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", help="pruned network to begin with, instead of pruning --model")
    parser.add_argument(
        "--model", help="dense network, to be pruned and for --distill: a name in timm's registry"
    )
    parser.add_argument("--weights", type=Path, help="its weights, safetensors; default: timm's, downloaded")
    parser.add_argument("--num-classes", type=int, help="its outputs; default: as many as it was trained for")
    parser.add_argument(
        "--criterion", default="d_score", help="one that looks at the weights alone (dscore list)"
    )
    parser.add_argument(
        "--target-macs", type=float, default=0.5, help="share of the MACs to keep (default 0.5)"
    )
    parser.add_argument("--layers", default="all", help="all, or inner: residual sums stay whole")
    parser.add_argument("--allocation", default="uniform", help="uniform or global")
    parser.add_argument("--dataset", default="", help="'' for folders, wds/NAME, hfds/NAME or hfids/NAME")
    parser.add_argument("--data-dir", help="the folder of the images or shards; for the Hub the cache")
    parser.add_argument("--train-split", default="train", help="name of the split, folder or shards")
    parser.add_argument(
        "--val-split", default="validation", help="likewise (default validation, or the folder val)"
    )
    parser.add_argument("--train-samples", type=int, help="images of a stream, where its files do not say")
    parser.add_argument("--val-samples", type=int, help="likewise")
    parser.add_argument("--input-key", help="of the image in a record")
    parser.add_argument("--target-key", help="of the label in a record")
    parser.add_argument("--image-size", type=int, help="height and width; default: the model's own")
    parser.add_argument("--auto-augment", help="timm's policies, such as rand-m7-mstd0.5")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    finetuning.add_training_options(parser, batch_size=256, weight_decay=1e-4)
    arguments = parser.parse_args()
    if (
        arguments.artifact is None or arguments.distill or arguments.distill_features
    ) and not arguments.model:
        parser.error("give --model, or --artifact (and both where there is a teacher)")
    return arguments


if __name__ == "__main__":
    try:
        main()
    except DScoreError as error:
        sys.exit(f"error: {error}")
