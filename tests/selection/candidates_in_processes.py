"""What test_candidates.py runs under ``torchrun``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from dscore_plugin.files import write_json
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.selection.candidates import Options, Pool, Search, search

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.selection.helpers import labelled_images, network  # noqa: E402

SHAPE = (1, 8, 8)


def found(racing: bool, checkpoint: Path | None = None) -> Search:
    """The same search wherever it is called: 13 candidates on 90 images."""
    torch.set_num_threads(1)
    model = network("digits_cnn")
    groups = PruningGraph(model, (torch.zeros(1, *SHAPE),)).prunable
    pools = [Pool(group.name, group.units, group.units // 4, group) for group in groups]
    images = labelled_images(model, 90, SHAPE, wrong=7)
    return search(model, pools, images, Options(13, seed=3, racing=racing), checkpoint=checkpoint)


def summary(result: Search) -> dict[str, object]:
    """Everything that was found, as JSON."""
    removed = {name: gone.tolist() for name, gone in result.winner.removed.items()}
    return {"winner": removed, "seen": list(result.seen), "correct": list(result.correct)}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = [summary(found(racing, folder / f"{racing}.jsonl")) for racing in (False, True)]
    write_json(folder / f"rank{os.environ['RANK']}.json", results)
