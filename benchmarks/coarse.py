"""How long the search over random masks takes, beside the naive loop: copy, mask, evaluate everything.

Both compare the same candidates on the same validation images in the same run. Then racing: how many images it looks
at, and how often it finds the same winner. Every seed is searched in full once; racing reads what it needs of these
counts from the full search's file, as each candidate's count on each piece of the images is the same in both. Its own
time is measured for the first seed, without that file. Interrupted, it goes on from ``--work``; the seeds that are
searched already are not measured again, the timing is.

    python benchmarks/coarse.py --data cifar10:PATH --weights resnet20.safetensors \\
        --out benchmarks/results/coarse.json
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import command, here
from torch import nn

from dscore_plugin.datasets import ImageSet, load_data
from dscore_plugin.files import write_json
from dscore_plugin.groups import removal_count
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.masking import masked
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.selection.candidates import Options, Pool, Search, sample_candidate, search
from dscore_plugin.training.evaluation import evaluate

BOUND_MINUTES, BOUND_FEWER = 3.0, 3.0


def naive_search(
    model: nn.Module, pools: list[Pool], images: ImageSet, number: int, seed: int
) -> tuple[list[int], float]:
    """Return every candidate's right answers, and the seconds that it took."""
    start, correct = time.perf_counter(), []
    for index in range(number):
        removed = sample_candidate(pools, seed, index).removed
        copied = copy.deepcopy(model)
        with masked(copied, [(pool.group, removed[pool.name].tolist()) for pool in pools if pool.group]):
            correct.append(round(evaluate(copied, images).top1 * len(images) / 100))
    return correct, time.perf_counter() - start


def timed(
    model: nn.Module, pools: list[Pool], images: ImageSet, number: int, **options: Any
) -> tuple[Search, float]:
    start = time.perf_counter()
    return search(model, pools, images, Options(number, **options)), time.perf_counter() - start


def compare(
    model: nn.Module, pools: list[Pool], images: ImageSet, args: argparse.Namespace
) -> dict[str, Any]:
    """Time the naive loop, the search and the race for the first seed."""
    warm = images.subset(64)
    naive_search(model, pools, warm, 1, 0)
    timed(model, pools, warm, 1)
    full, seconds = timed(model, pools, images, args.candidates)
    print(f"search: {seconds:.1f} s", file=sys.stderr)
    correct, naive_seconds = naive_search(model, pools, images, args.candidates, 0)
    print(f"naive loop: {naive_seconds:.1f} s", file=sys.stderr)
    raced, raced_seconds = timed(model, pools, images, args.candidates, racing=True)
    off = [abs(a - b) for a, b in zip(full.correct, correct, strict=True)]
    return {
        "naive_s": round(naive_seconds, 1),
        "search_s": round(seconds, 1),
        "times_faster": round(naive_seconds / seconds, 2),
        "racing_s": round(raced_seconds, 1),
        "racing_times_faster": round(naive_seconds / raced_seconds, 2),
        "same_winner": full.winner.index == correct.index(max(correct)),
        "counts_that_differ": sum(map(bool, off)),
        "largest_difference_in_images": max(off),
        "winner_top1": round(100 - full.mcr, 2),
    }


def race(model: nn.Module, pools: list[Pool], images: ImageSet, args: argparse.Namespace) -> dict[str, Any]:
    """Search in full and race, for every seed."""
    rows = []
    for seed in range(args.seeds):
        file = args.work / f"seed{seed}.jsonl"
        full, raced = (
            search(
                model,
                pools,
                images,
                Options(args.candidates, seed, racing=racing),
                checkpoint=file,
                resume=True,
            )
            for racing in (False, True)
        )
        ranked = [index for _, index in sorted((-right, index) for index, right in enumerate(full.correct))]
        rows.append(
            {
                "seed": seed,
                "top1": round(100 - full.mcr, 2),
                "top1_racing": round(100 - raced.mcr, 2),
                "rank_of_racing_winner": ranked.index(raced.winner.index) + 1,
                "fewer_evaluations": round(full.evaluations / raced.evaluations, 2),
            }
        )
        print(rows[-1], file=sys.stderr)
    lost = [row["top1"] - row["top1_racing"] for row in rows]
    return {
        "seeds": rows,
        "same_winner": sum(row["rank_of_racing_winner"] == 1 for row in rows),
        "mean_points_lost": round(sum(lost) / len(lost), 2),
        "fewer_evaluations": min(row["fewer_evaluations"] for row in rows),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="e.g. cifar10:PATH")
    parser.add_argument("--weights", required=True, type=Path, help="safetensors")
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--images", type=int, default=1000, help="of the validation split")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--work", type=Path, default=Path("runs/coarse"), help="what is measured already")
    parser.add_argument("--out", help="write the result here, too")
    return parser.parse_args()


def main() -> int:
    args = parse()
    data = load_data(args.data)
    model = create_model(args.model, num_classes=data.num_classes, in_chans=data.input_shape[0]).eval()
    load_weights(model, args.weights)
    images = data.validation.subset(min(args.images, len(data.validation)))
    groups = PruningGraph(model, (torch.zeros(1, *data.input_shape),)).prunable
    pools = [Pool(g.name, g.units, removal_count(args.ratio, g.units), g) for g in groups if g.is_inner]
    speed = compare(model, pools, images, args)
    racing = race(model, pools, images, args)
    within = {
        f"under {BOUND_MINUTES:g} minutes": speed["search_s"] < 60 * BOUND_MINUTES,
        "faster than the naive loop": speed["times_faster"] > 1,
        "same winner as the naive loop": speed["same_winner"],
        f"racing at least {BOUND_FEWER:g} x fewer": racing["fewer_evaluations"] >= BOUND_FEWER,
    }
    result = {
        "model": args.model, "ratio": args.ratio, "candidates": args.candidates, "images": len(images),
        "groups": [pool.name for pool in pools], **speed, "racing": racing, "within_bounds": within,
        **here(), "command": command(),
    }  # fmt: skip
    print(report(result))
    if args.out:
        write_json(args.out, result)
    return 0 if all(within.values()) else 1


def report(result: dict[str, Any]) -> str:
    racing = result["racing"]
    return "\n".join(
        [
            f"{result['candidates']} candidates, {result['images']} images, ratio {result['ratio']}",
            f"naive loop  {result['naive_s']:8.1f} s",
            f"search      {result['search_s']:8.1f} s  {result['times_faster']:.2f}x, the same winner: "
            f"{result['same_winner']}; {result['counts_that_differ']} counts differ, by at most "
            f"{result['largest_difference_in_images']} images",
            f"racing      {result['racing_s']:8.1f} s  {result['racing_times_faster']:.2f}x, "
            f"{racing['fewer_evaluations']:.2f}x fewer image evaluations, the same winner for "
            f"{racing['same_winner']} of {len(racing['seeds'])} seeds, {racing['mean_points_lost']:.2f} points lost "
            "on average",
            *(f"{'ok  ' if met else 'MISS'}  {bound}" for bound, met in result["within_bounds"].items()),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
