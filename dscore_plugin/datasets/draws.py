"""What is random about a data set: pure functions of seeds, each from a stream of its own."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from dscore_plugin.errors import DataError

AUGMENTATION, ORDER, SUBSET, SPLIT = range(4)


@functools.lru_cache(maxsize=2)
def random_table(seed: int, epoch: int, rows: int, highs: tuple[int, ...]) -> np.ndarray:
    """Draw the numbers that augment each image of a source: ``(rows, len(highs))``, below ``highs``."""
    return np.random.default_rng([seed, epoch, AUGMENTATION]).integers(highs, size=(rows, len(highs)))


def ranks_within_class(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Number the images of each class 0, 1, 2, ... in random order."""
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks


def hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split images class by class.

    Args:
        labels: class of every image, ``(n,)``.
        fraction: how much of each class is held out; at least one image, and at most all but one.
        seed: of the choice.

    Returns:
        Indices that stay and indices held out, both ascending.

    Raises:
        DataError: if nothing could be held out, as every class has one image only.
    """
    counts = np.bincount(labels.numpy())
    quota = np.minimum(np.maximum(np.floor(fraction * counts + 0.5), 1), counts - 1)
    ranks = ranks_within_class(labels.numpy(), np.random.default_rng([seed, SPLIT]))
    held_out = torch.from_numpy(ranks < quota[labels.numpy()])
    if not held_out.any():
        raise DataError(
            f"no validation images can be held out of {len(labels)} training images; "
            "expected a class with two images or more"
        )
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()
