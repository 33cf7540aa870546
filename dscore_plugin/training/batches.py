"""Which images make up which batch, and which process reads them.

accelerate can prepare a loader too, but it either repeats images to fill the last batch or leaves a process
without one (here the gradient of a global batch is the same for every number of processes), and it calls the
set's ``set_epoch`` with a count of its own, which starts at 0 with every loader.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from dscore_plugin.datasets import ImageSet

MIXING, AUGMENTATION = 1, 2  # streams of random numbers beside those of an epoch and a process


def stream_seed(seed: int, *stream: int) -> int:
    """Derive an independent 32-bit seed for one stream of random numbers, such as ``(epoch, process)``."""
    return int(np.random.SeedSequence([seed, *stream]).generate_state(1)[0])


def count_steps(images: int, batch_size: int) -> int:
    """Count the batches of one epoch.

    A last batch of a single image is dropped where there are others: batch normalisation cannot train on it.
    """
    full, rest = divmod(images, batch_size)
    return full + (rest > 1 or (rest == 1 and full == 0))


def shuffled_batches(images: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Give the global batches of one epoch: a pure function of the arguments.

    Args:
        images: size of the set.
        batch_size: the global batch.
        seed: of the run.
        epoch: counted from 0.

    Returns:
        Indices of the images, ``count_steps(images, batch_size)`` lists of them.
    """
    generator = torch.Generator().manual_seed(stream_seed(seed, epoch, 0))
    order = torch.randperm(images, generator=generator).tolist()
    steps = count_steps(images, batch_size)
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(steps)]


def share_of(batch: Sequence[int], process: int, processes: int) -> tuple[list[int], int]:
    """Give one process its share of a global batch.

    Args:
        batch: indices of the global batch.
        process: which, counted from 0.
        processes: how many.

    Returns:
        The indices to run through the model, and how many of them, from the first on, count. Images that
        do not count fill a share up to two, as far as the batch has them: batch norm cannot train on one.
    """
    share = list(batch[process::processes])
    if len(share) >= 2:
        return share, len(share)
    filling = [index for index in batch if index not in share][: 2 - len(share)]
    return share + filling, len(share)


def share_of_pairs(batch: Sequence[int], process: int, processes: int) -> tuple[list[int], int]:
    """Give one process its share of a global batch whose images are mixed in pairs.

    The first image and the last are a pair, the second and the last but one, and so on; the middle one of an odd
    batch has no partner and is left out. In the share, too, the i-th image and the i-th from its end are a pair.

    Args:
        batch: indices of the global batch, at least two.
        process: which, counted from 0.
        processes: how many.

    Returns:
        As :func:`share_of`; a share without a pair of its own is filled with the first.
    """
    mine = range(process, len(batch) // 2, processes)
    pairs = mine or range(1)
    return [batch[i] for i in pairs] + [batch[-1 - i] for i in reversed(pairs)], 2 * len(mine)


def load_batches(images: ImageSet, batches: Sequence[Sequence[int]], *, workers: int = 0) -> DataLoader[Any]:
    """Load given batches in the given order.

    Args:
        images: the set; its ``__getitems__`` gives ready batches.
        batches: indices of each batch.
        workers: loader processes.

    Returns:
        A loader of ``(images (B, C, H, W), labels (B,))``.
    """
    return DataLoader(
        images,
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of index lists will do
        collate_fn=_as_they_are,
        num_workers=workers,
        generator=torch.Generator(),  # else the loader draws from the global random numbers
        pin_memory=torch.cuda.is_available(),
    )


def _as_they_are(batch: Any) -> Any:
    return batch
