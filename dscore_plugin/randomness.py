"""Random numbers on loan: code that draws from the global generators, as a pure function of a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def own_random_numbers() -> Iterator[Callable[[int], None]]:
    """Lend out the global random numbers of Python, numpy and torch (on the processor), and restore them.

    Yields:
        A function that seeds all three with a number in ``[0, 2^32)``.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield _seed
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the accelerator's too
