from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dscore_plugin.errors import BudgetError
from dscore_plugin.groups import ChannelGroup, ScoredGroup
from dscore_plugin.selection.allocation import GlobalPath, Limits, UniformPath, total


def scored(name: str, units: int, division: int = 1, low: float = 0.0, high: float = 1.0) -> ScoredGroup:
    """A group whose scores rise from ``low`` to ``high``."""
    scores = torch.linspace(low, high, units, dtype=torch.float64)
    return ScoredGroup(ChannelGroup(name, units * division, division, ()), scores)


@st.composite
def networks(draw: st.DrawFn) -> list[ScoredGroup]:
    sizes = draw(st.lists(st.integers(2, 40), min_size=1, max_size=6))
    seed = draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    return [
        ScoredGroup(
            ChannelGroup(str(place), units * division, division, ()),
            torch.rand(units, generator=generator, dtype=torch.float64),
        )
        for place, (units, division) in enumerate(
            (size, draw(st.sampled_from([1, 1, 2, 3]))) for size in sizes
        )
    ]


@given(networks(), st.integers(1, 12), st.none() | st.integers(1, 12), st.integers(0, 50))
def test_clamped_counts_are_the_largest_that_are_allowed(
    network: list[ScoredGroup], least: int, round_to: int | None, count: int
) -> None:
    limits = Limits(network, least, round_to)
    for item in network:
        units, division = item.group.units, item.group.division

        def allowed(removed: int, units: int = units, division: int = division) -> bool:
            left = (units - removed) * division
            keeps_enough = left >= min(least, units * division) and removed < units
            return removed == 0 or (keeps_enough and left % (round_to or 1) == 0)

        expected = max(removed for removed in range(min(count, units) + 1) if allowed(removed))
        assert limits.clamp(item.group.name, count) == expected


@given(networks(), st.none() | st.integers(1, 6), st.integers(0, 40), st.integers(0, 40))
def test_steps_lead_to_the_next_allowed_count(
    network: list[ScoredGroup], round_to: int | None, count: int, most: int
) -> None:
    limits = Limits(network, 1, round_to)
    name = network[0].group.name
    start = limits.clamp(name, count)
    following = limits.step(name, start, most)
    allowed = [c for c in range(start + 1, most + 1) if limits.clamp(name, c) == c]
    assert following == (allowed[0] if allowed else start)


@pytest.mark.parametrize("options", [{"min_channels": 0}, {"round_to": 0}, {"min_channels": -3}])
def test_limits_below_one_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(BudgetError, match="must be at least 1"):
        Limits([scored("a", 4)], **options)


def test_a_layer_that_cannot_be_a_multiple_stays_whole() -> None:
    limits = Limits([scored("a", 6), scored("b", 12)], 1, 8)
    assert limits.clamp("a", 5) == 0
    assert limits.clamp("b", 3) == 0
    assert limits.clamp("b", 11) == 4


def test_multiples_are_counted_in_channels_not_in_units() -> None:
    limits = Limits([scored("grouped", 8, division=4)], 1, 8)  # 32 channels: 24 and 16 and 8 may stay
    assert [limits.clamp("grouped", count) for count in range(8)] == [0, 0, 2, 2, 4, 4, 6, 6]


@given(networks(), st.floats(0, 1))
def test_uniform_is_the_floor_of_every_group(network: list[ScoredGroup], ratio: float) -> None:
    counts = UniformPath(network, Limits(network)).at(ratio)
    for item in network:
        assert counts[item.group.name] == min(
            math.floor(ratio * item.group.units + 1e-9), item.group.units - 1
        )


@given(networks(), st.floats(0, 1))
def test_global_takes_the_lowest_scores_and_clamps(network: list[ScoredGroup], ratio: float) -> None:
    counts = GlobalPath(network, Limits(network)).at(ratio)
    everything = sorted((float(score), item.group.name) for item in network for score in item.scores)
    lowest = everything[: math.floor(ratio * len(everything) + 1e-9)]
    for item in network:
        below = sum(name == item.group.name for _, name in lowest)
        assert counts[item.group.name] == min(below, item.group.units - 1)


def test_a_group_wholly_below_the_threshold_is_clamped_not_skipped() -> None:
    network = [scored("weak", 10, high=0.1), scored("strong", 10, low=0.5)]
    assert GlobalPath(network, Limits(network)).at(0.6) == {"weak": 9, "strong": 2}
    assert GlobalPath(network, Limits(network, min_channels=4)).at(0.6) == {"weak": 6, "strong": 2}


@pytest.mark.parametrize("path", [UniformPath, GlobalPath])
@given(network=networks(), least=st.integers(1, 5), round_to=st.none() | st.integers(1, 8))
@settings(max_examples=60)
def test_paths_begin_at_nothing_and_never_fall(
    path: type[UniformPath], network: list[ScoredGroup], least: int, round_to: int | None
) -> None:
    family = path(network, Limits(network, least, round_to))
    assert total(family.at(0)) == 0
    before = family.at(0)
    for step in range(1, 21):
        counts = family.at(step / 20)
        assert all(counts[name] >= before[name] for name in counts)
        before = counts
    assert all(before[item.group.name] <= item.limit(least) for item in network)


def test_total() -> None:
    assert total({"a": 3, "b": 0, "c": 4}) == 7
