"""How fast discrimination-aware channel pruning chooses, beside the literal loop of its authors.

The literal loop (tests/selection/dcp_reference.py) makes two passes over the images for every channel, each from the
images on: through the unpruned network up to the layer, through the pruned one up to the layer's loss, and back. Ours
records the inputs and the reference outputs of a layer once. Both see the same heads, batches and layers, in float32
and channels_last; layer by layer they take turns, so that what else the machine does meets both alike. A third turn
adds four channels at a time, and its different choices are counted.

    python benchmarks/dcp.py --data cifar10:PATH --weights resnet56.safetensors --out benchmarks/results/dcp.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import command, here

from dscore_plugin.datasets import load_data
from dscore_plugin.files import write_json
from dscore_plugin.groups import removal_count
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.selection.discrimination_aware import DiscriminationAwareSelector, selection_batches
from dscore_plugin.selection.discrimination_run import TuningData
from dscore_plugin.selection.greedy_channels import GreedyOptions, GreedySelection, LayerTask
from dscore_plugin.selection.layer_candidates import candidates
from dscore_plugin.training.head_places import find_segments
from dscore_plugin.training.heads import Heads, Losses, frozen_copy, train_heads
from dscore_plugin.training.progress import RichProgress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.selection.dcp_reference import Layer, prune_layer  # noqa: E402

AT_ONCE = 4
BOUNDS = {"literal / ours": 3.0, f"literal / ours, {AT_ONCE} at a time": 10.0}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--model", default="cifar_resnet56")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--every", type=int, default=4, help="take every n-th layer; 1 takes all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def timed(do: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = do()
    return time.perf_counter() - began, result


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    data = load_data(options.data, seed=options.seed)
    model = create_model(options.model, num_classes=data.num_classes, in_chans=data.input_shape[0])
    load_weights(model, options.weights)
    model = model.to(memory_format=torch.channels_last)
    example = (torch.zeros(1, *data.input_shape),)
    images = data.train.plain().subset(options.images, seed=options.seed)
    batches = selection_batches(images, options.batch_size, options.seed)

    found = {c.layer: c for c in candidates(model, example, PruningGraph(model, example).prunable)}
    segments = find_segments(model, example, list(found))
    heads = Heads(segments, model, example, options.seed)
    tuning, selector = TuningData.of(batches), DiscriminationAwareSelector()
    train_heads(
        model, heads, tuning.batches, tuning.steps, selector.tuning_config(options.seed), Losses.alone(heads),
        progress=RichProgress(),
    )  # fmt: skip
    heads = frozen_copy(heads)
    ends = {layer: segment.end for segment in segments for layer in segment.layers}
    chosen = list(ends)[options.every // 2 :: options.every]

    original, literal = frozen_copy(model), frozen_copy(model)
    started, one = timed(lambda: GreedySelection(original, model, heads, batches, GreedyOptions()))
    more = GreedySelection(original, model, heads, batches, GreedyOptions(channels_per_step=AT_ONCE))
    batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches]
    rows = []
    for layer in chosen:
        width, units = found[layer].group.units, found[layer].units
        task = LayerTask(layer, units, ends[layer], width - removal_count(options.rate, width))
        head = heads.of(ends[layer]) if ends[layer] else None
        reference = Layer(layer, ends[layer], head)
        theirs, expected = timed(
            lambda reference=reference: prune_layer(original, literal, reference, batches, rate=options.rate)
        )
        ours, same = timed(lambda task=task: one.choose(task))
        ours_at_once, other = timed(lambda task=task: more.choose(task))
        rows.append(
            {
                "layer": layer,
                "inputs": width,
                "literal_s": theirs,
                "ours_s": ours,
                "ours_at_once_s": ours_at_once,
                "same_channels": sorted(same.order) == sorted(expected),
                "same_order": list(same.order) == expected,
                "different_at_once": len(set(other.order) - set(expected)),
                "kept": len(expected),
            }
        )
        print({key: round(x, 1) if isinstance(x, float) else x for key, x in rows[-1].items()}, flush=True)

    sums = {key: sum(row[key] for row in rows) for key in ("literal_s", "ours_s", "ours_at_once_s")}
    ratios = [sums["literal_s"] / sums[key] for key in ("ours_s", "ours_at_once_s")]
    within = all(ratio >= bound for ratio, bound in zip(ratios, BOUNDS.values(), strict=True))
    same_channels = all(row["same_channels"] for row in rows)
    result = {
        "model": options.model,
        "rate": options.rate,
        "images": options.images,
        "batch_size": options.batch_size,
        "ratios": dict(zip(BOUNDS, ratios, strict=True)),
        "bounds": BOUNDS,
        "within_bounds": within,
        "same_channels": same_channels,
        "different_at_once": sum(row["different_at_once"] for row in rows),
        "kept": sum(row["kept"] for row in rows),
        "seconds": {**sums, "starting": started},
        "rows": rows,
        "seed": options.seed,
        **here(),
        "command": command(),
    }
    write_json(options.out, result)
    print(f"ratios {[round(ratio, 2) for ratio in ratios]}, the same channels: {same_channels}")
    return 0 if within and same_channels else 1


if __name__ == "__main__":
    sys.exit(main())
