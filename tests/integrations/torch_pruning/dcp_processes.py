"""What test_discrimination_aware.py runs twice: each process sees its share of the images."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from dscore_plugin import DiscriminationAwareImportance
from tests.selection.test_discrimination_aware import IMAGE, batches, network


def scores(data: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    from tests.integrations.torch_pruning.test_discrimination_aware import groups_of, heads_of

    model = network()
    importance = DiscriminationAwareImportance()
    importance.watch(model, IMAGE, heads_of(model))
    for images, labels in data:
        importance.update(images, labels)
    found = [importance(group) for group in groups_of(model).values()]
    return [score for score in found if score is not None]


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2
    )
    torch.save(scores(batches()[rank::2]), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
