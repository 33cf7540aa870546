from __future__ import annotations

import math
import re
from collections.abc import Mapping

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dscore_plugin.errors import BudgetError
from dscore_plugin.groups import ChannelGroup, ScoredGroup
from dscore_plugin.selection.allocation import GlobalPath, Limits, UniformPath
from dscore_plugin.selection.budget import Measure, check_fraction, meet, meet_latency

PATHS = (UniformPath, GlobalPath)


class Net:
    """Groups in a chain: layer i costs what is left of it times what is left of the layer before."""

    def __init__(self, sizes: list[int], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.scored = [
            ScoredGroup(
                ChannelGroup(str(place), size, 1, ()),
                torch.rand(size, generator=generator, dtype=torch.float64),
            )
            for place, size in enumerate(sizes)
        ]
        self.sizes = sizes

    def macs(self, counts: Mapping[str, int]) -> float:
        left = [3, *(size - counts[str(place)] for place, size in enumerate(self.sizes)), 10]
        return float(sum(a * b for a, b in zip(left, left[1:], strict=False)))

    def share(self, counts: Mapping[str, int]) -> float:
        return self.macs(counts) / self.macs(dict.fromkeys(map(str, range(len(self.sizes))), 0))


@pytest.mark.parametrize("path", PATHS)
@given(
    sizes=st.lists(st.integers(4, 64), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    target=st.floats(0.05, 0.95),
)
@settings(max_examples=100, deadline=None)
def test_budgets_are_met_from_below_within_one_channel(
    path: type[UniformPath], sizes: list[int], seed: int, target: float
) -> None:
    net = Net(sizes, seed)
    limits = Limits(net.scored)
    family = path(net.scored, limits)
    assume(net.share(family.at(1)) <= target)
    counts = meet(family, net.share, target, net.scored, limits)
    assert net.share(counts) <= target
    given_back = []
    for name, count in counts.items():
        assert 0 <= count < net.scored[int(name)].group.units
        if count:
            given_back.append(net.share({**counts, name: count - 1}))
    assert max(given_back) > target  # at least one channel is needed


def test_the_last_channels_are_those_with_the_lowest_scores() -> None:
    net = Net([10, 10])
    net.scored = [
        ScoredGroup(net.scored[0].group, torch.linspace(0.5, 0.9, 10)),
        ScoredGroup(net.scored[1].group, torch.linspace(0.1, 0.3, 10)),
    ]
    limits = Limits(net.scored)
    just_one = net.share({"0": 0, "1": 1})
    counts = meet(UniformPath(net.scored, limits), net.share, just_one, net.scored, limits)
    assert counts == {"0": 0, "1": 1}


@pytest.mark.parametrize("path", PATHS)
def test_multiples_stay_multiples(path: type[UniformPath]) -> None:
    net = Net([64, 48, 32])
    limits = Limits(net.scored, round_to=8)
    counts = meet(path(net.scored, limits), net.share, 0.5, net.scored, limits)
    assert net.share(counts) <= 0.5
    assert all((size - counts[str(place)]) % 8 == 0 for place, size in enumerate(net.sizes))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("least", "target"), [(30, 0.1), (63, 0.9), (8, 0.02)])
def test_an_unreachable_budget_names_one_that_can_be_met(
    path: type[UniformPath], least: int, target: float
) -> None:
    net = Net([64, 64, 64])
    limits = Limits(net.scored, min_channels=least)
    family = path(net.scored, limits)
    with pytest.raises(BudgetError, match="target_params .* cannot be reached: at most") as caught:
        meet(family, net.share, target, net.scored, limits, "target_params")
    nearest = re.search(r"the nearest is ([0-9.]+)$", str(caught.value))
    assert nearest is not None
    counts = meet(family, net.share, float(nearest[1]), net.scored, limits)
    assert net.share(counts) <= float(nearest[1]) <= net.share(family.at(1)) + 0.001
    assert "\n" not in str(caught.value)


def test_where_nothing_can_leave_no_budget_is_named() -> None:
    net = Net([8, 8])
    limits = Limits(net.scored, min_channels=8)
    with pytest.raises(BudgetError, match=r"at most 0.0% can go .* no more than 0.1 % can$"):
        meet(UniformPath(net.scored, limits), net.share, 0.5, net.scored, limits)


@pytest.mark.parametrize("value", [0, 1, -0.2, 1.5, math.nan, math.inf])
def test_fractions_out_of_range_are_refused(value: float) -> None:
    with pytest.raises(BudgetError, match=r"ratio must lie between 0 and 1 \(exclusive\), got"):
        check_fraction("ratio", value)
    net = Net([8])
    limits = Limits(net.scored)
    with pytest.raises(BudgetError, match="target_macs must lie between"):
        meet(UniformPath(net.scored, limits), net.share, value, net.scored, limits)


def measured(net: Net) -> tuple[Measure, list[float]]:
    seen: list[float] = []

    def measure(counts: Mapping[str, int]) -> float:
        seen.append(0.2 + 0.8 * net.share(counts))
        return seen[-1]

    return measure, seen


@pytest.mark.parametrize("target", [0.4, 0.6, 0.9])
def test_latency_is_met_within_the_tolerance(target: float) -> None:
    net = Net([64, 64])
    measure, seen = measured(net)
    counts = meet_latency(UniformPath(net.scored, Limits(net.scored)), measure, target)
    assert 0.2 + 0.8 * net.share(counts) == pytest.approx(target, rel=0.05)
    assert len(seen) <= 12


def test_a_latency_that_cannot_be_had_names_the_nearest() -> None:
    net = Net([64, 64])
    measure, seen = measured(net)
    with pytest.raises(BudgetError, match="0.05 cannot be reached.*the nearest that was measured is 0.2"):
        meet_latency(UniformPath(net.scored, Limits(net.scored)), measure, 0.05)
    assert len(seen) == len({round(value, 9) for value in seen})  # no allocation is measured twice
