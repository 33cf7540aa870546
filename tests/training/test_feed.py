from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dscore_plugin.errors import DataError, TrainingError
from dscore_plugin.training.batches import share_of_pairs, shuffled_batches
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.feed import ImageStream, make_feed
from tests.training.conftest import TinyImages, tiny_images


def numbered(count: int) -> TinyImages:
    """Images whose label tells which one it is."""
    return TinyImages(torch.zeros(count, 3, 2, 2), torch.arange(count))


def labels_of(images: Any, config: TrainingConfig, processes: int, epoch: int = 1) -> list[list[list[int]]]:
    """Give, for each step, the labels that count: one list for each portion of each process."""
    feeds = [make_feed(images, config, process, processes).epoch(epoch) for process in range(processes)]
    steps = []
    for parts in zip(*feeds, strict=True):
        assert len({part.size for part in parts}) == 1
        portions = [portion for part in parts for portion in part.portions]
        assert all(len(portion.labels) >= min(2, len(images)) for portion in portions)
        assert sum(portion.counted for portion in portions) == parts[0].size
        steps.append([portion.labels[: portion.counted].tolist() for portion in portions])
    return steps


@given(size=st.integers(2, 20), processes=st.integers(1, 7))
def test_shares_of_pairs_keep_pairs_together(size: int, processes: int) -> None:
    batch = list(range(100, 100 + size))
    partner = dict(zip(batch, reversed(batch), strict=True))
    shares = [share_of_pairs(batch, process, processes) for process in range(processes)]
    counted = list(itertools.chain.from_iterable(share[:count] for share, count in shares))
    middle = [batch[size // 2]] if size % 2 else []
    assert sorted(counted + middle) == batch
    for share, count in shares:
        assert count in (0, len(share))
        assert len(share) >= 2
        assert [partner[index] for index in share] == share[::-1]


def test_one_process_shares_a_batch_of_pairs_with_nobody() -> None:
    assert share_of_pairs([5, 3, 9, 1], 0, 1) == ([5, 3, 9, 1], 4)
    assert share_of_pairs([5, 3, 7, 9, 1], 0, 1) == ([5, 3, 9, 1], 4)


@given(
    images=st.integers(2, 40),
    half=st.integers(1, 8),
    processes=st.integers(1, 3),
    accumulate=st.integers(1, 2),
    mixup=st.sampled_from([0.0, 0.5]),
)
def test_every_division_of_a_batch_gives_the_same_images(
    images: int, half: int, processes: int, accumulate: int, mixup: float
) -> None:
    data, config = (
        numbered(images),
        TrainingConfig(2, batch_size=2 * half, accumulate=accumulate, mixup=mixup),
    )
    found = [sorted(itertools.chain(*step)) for step in labels_of(data, config, processes)]
    batches = shuffled_batches(images, 2 * half, config.seed, 1)
    if mixup:  # the middle one of an odd batch has no partner
        batches = [
            [i for i in batch if len(batch) % 2 == 0 or i != batch[len(batch) // 2]] for batch in batches
        ]
    assert found == [sorted(batch) for batch in batches]
    assert make_feed(data, config).steps == len(batches)
    assert make_feed(data, config).readers is None


def test_without_parts_and_mixing_a_share_is_every_nth_image() -> None:
    data, config = numbered(12), TrainingConfig(2, batch_size=6)
    batches = shuffled_batches(12, 6, config.seed, 1)
    assert labels_of(data, config, 2) == [[batch[0::2], batch[1::2]] for batch in batches]


def test_a_single_image_cannot_be_mixed() -> None:
    with pytest.raises(TrainingError, match="pair images"):
        make_feed(numbered(1), TrainingConfig(1, batch_size=2, mixup=0.1))


class Numbers:
    """A stream of numbered images, endless unless ``ends`` is given."""

    def __init__(self, count: int, ends: int | None = None) -> None:
        self.count, self.ends = count, ends

    def __len__(self) -> int:
        return self.count

    def training_batches(
        self, epoch: int, batch_size: int, *, seed: int, process: int, processes: int, workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        numbers = itertools.islice(itertools.cycle(range(process, self.count, processes)), self.ends)
        while chosen := list(itertools.islice(numbers, batch_size)):
            yield torch.zeros(len(chosen), 3, 2, 2), torch.tensor(chosen)

    def evaluation_batches(self, batch_size: int, **division: int) -> Iterator[tuple[Tensor, Tensor]]:
        raise AssertionError


def test_a_stream_is_cut_into_full_batches() -> None:
    assert isinstance(Numbers(3), ImageStream)
    assert not isinstance(tiny_images(3), ImageStream)
    config = TrainingConfig(2, batch_size=8, accumulate=2, workers=3)
    assert labels_of(Numbers(21), config, 2) == [
        [[0, 2], [4, 6], [1, 3], [5, 7]],
        [[8, 10], [12, 14], [9, 11], [13, 15]],
    ]
    assert make_feed(Numbers(21), config, 0, 2).steps == 2
    assert make_feed(Numbers(21), config, 0, 2).readers == {"processes": 2, "workers": 3}


@pytest.mark.parametrize(
    ("changes", "processes", "images"),
    [({}, 3, 100), ({"accumulate": 8}, 1, 100), ({"mixup": 0.1, "batch_size": 6}, 2, 100), ({}, 1, 7)],
)
def test_a_stream_needs_equal_parts(changes: dict[str, Any], processes: int, images: int) -> None:
    config = TrainingConfig(1, **{"batch_size": 8, **changes})
    with pytest.raises(TrainingError, match=f"^batch_size={config.batch_size} "):
        make_feed(Numbers(images), config, 0, processes)


@pytest.mark.parametrize("ends", [8, 10])
def test_a_stream_that_ends_early_is_named(ends: int) -> None:
    steps = make_feed(Numbers(16, ends), TrainingConfig(1, batch_size=8)).epoch(0)
    next(steps)
    with pytest.raises(DataError, match="ended at step 2 of 2, in process 1"):
        next(steps)
