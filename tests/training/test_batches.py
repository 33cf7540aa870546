from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscore_plugin.training.batches import (
    count_steps,
    load_batches,
    share_of,
    shuffled_batches,
    stream_seed,
)
from tests.training.conftest import tiny_images


@given(
    images=st.integers(1, 60), batch_size=st.integers(1, 20), seed=st.integers(0, 5), epoch=st.integers(0, 5)
)
def test_an_epoch_shows_every_image_once_but_never_a_batch_of_one(
    images: int, batch_size: int, seed: int, epoch: int
) -> None:
    batches = shuffled_batches(images, batch_size, seed, epoch)
    shown = list(itertools.chain.from_iterable(batches))
    dropped = 1 if batch_size > 1 and images > 1 and images % batch_size == 1 and images > batch_size else 0
    assert len(shown) == len(set(shown)) == images - dropped
    assert len(batches) == count_steps(images, batch_size)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    if images > 1 and batch_size > 1:
        assert all(len(batch) > 1 for batch in batches)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = {(seed, epoch): shuffled_batches(40, 8, seed, epoch) for seed in range(3) for epoch in range(3)}
    assert all(shuffled_batches(40, 8, *key) == order for key, order in orders.items())
    assert len({str(order) for order in orders.values()}) == 9


@given(size=st.integers(1, 20), processes=st.integers(1, 5))
def test_shares_make_up_the_batch_and_are_never_alone(size: int, processes: int) -> None:
    batch = list(range(100, 100 + size))
    shares = [share_of(batch, process, processes) for process in range(processes)]
    counted = list(itertools.chain.from_iterable(share[:count] for share, count in shares))
    assert sorted(counted) == batch
    for share, _ in shares:
        assert len(share) >= min(2, size)
        assert len(set(share)) == len(share)
        assert set(share) <= set(batch)


def test_streams_of_random_numbers_differ() -> None:
    seeds = {
        stream_seed(seed, epoch, process) for seed in range(5) for epoch in range(5) for process in range(3)
    }
    assert len(seeds) == 75
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_as_asked(workers: int) -> None:
    images = tiny_images(9)
    batches = [[3, 1], [8, 0, 2]]
    for (inputs, labels), batch in zip(load_batches(images, batches, workers=workers), batches, strict=True):
        assert inputs.equal(images.images[batch])
        assert labels.equal(images.labels[batch])
