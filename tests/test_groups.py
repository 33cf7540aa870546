from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dscore_plugin.groups import ChannelGroup, Member, Role, ScoredGroup, removal_count


def member(name: str, role: Role, units: int, spread: int = 1, offset: int = 0) -> Member:
    """A layer in which unit u holds the positions offset + u * spread, and so on for ``spread`` of them."""
    index = torch.arange(units * spread)
    return Member(name, role, index + offset, index // spread, units * spread + offset)


def group(channels: int = 8, division: int = 1, *members: Member) -> ChannelGroup:
    return ChannelGroup("root", channels, division, members)


@given(st.fractions(0, 1), st.integers(1, 5000))
def test_a_ratio_removes_its_floor(ratio: Fraction, width: int) -> None:
    assert removal_count(float(ratio), width) == math.floor(ratio * width + Fraction(1, 10**9))


@pytest.mark.parametrize(
    ("ratio", "width", "count"),
    [(0.3, 10, 3), (0.3, 16, 4), (0.29, 100, 29), (0.7, 10, 7), (1 / 3, 3, 1), (0.5, 1, 0)],
)
def test_rounding_of_floats_takes_no_channel_away(ratio: float, width: int, count: int) -> None:
    assert removal_count(ratio, width) == count


def test_positions_of_units() -> None:
    flat = member("linear", Role.CONSUMER, 4, spread=3, offset=2)
    assert flat.positions(torch.tensor([2, 0])).tolist() == [2, 3, 4, 8, 9, 10]
    assert flat.positions(torch.tensor([], dtype=torch.int64)).tolist() == []


def test_positions_are_sorted_and_single() -> None:
    twice = Member("conv", Role.CONSUMER, torch.tensor([5, 1, 5]), torch.tensor([0, 0, 0]), 6)
    assert twice.positions(torch.tensor([0])).tolist() == [1, 5]


@given(st.integers(1, 12), st.integers(1, 6), st.data())
def test_units_and_channels_say_the_same(units: int, division: int, data: st.DataObject) -> None:
    whole = group(units * division, division)
    chosen = tuple(sorted(data.draw(st.sets(st.integers(0, units - 1)))))
    channels = whole.root_channels(chosen)
    assert len(channels) == len(chosen) * division
    assert list(channels) == sorted(channels)
    assert whole.units_of(channels) == chosen


def test_channels_of_a_grouped_layer_leave_together() -> None:
    grouped = group(12, 3)
    assert grouped.units == 4
    assert grouped.root_channels([1, 3]) == (1, 3, 5, 7, 9, 11)
    assert grouped.units_of([9, 1, 5]) == (1,)
    with pytest.raises(ValueError, match=r"sets of 3: c, c \+ 4"):
        grouped.units_of([1, 5])


def test_roles_and_inner_groups() -> None:
    conv, bn = member("conv", Role.PRODUCER, 8), member("bn", Role.NORM, 8)
    inner = group(8, 1, conv, member("dw", Role.DEPTHWISE, 8), bn, member("next", Role.CONSUMER, 8))
    assert inner.roles(Role.NORM, Role.PRODUCER) == (conv, bn)
    assert inner.is_inner
    assert not group(8, 1, conv, member("skip", Role.PRODUCER, 8)).is_inner


def test_order_puts_the_lowest_first_and_ties_by_index() -> None:
    scored = ScoredGroup(group(5), torch.tensor([0.5, 0.1, 0.5, 0.0, 0.1], dtype=torch.float64))
    assert scored.order == (3, 1, 4, 0, 2)


@pytest.mark.parametrize(
    ("channels", "division", "least", "limit"),
    [
        (8, 1, 1, 7),
        (8, 1, 3, 5),
        (8, 1, 8, 0),
        (8, 1, 20, 0),
        (8, 4, 1, 1),
        (12, 3, 4, 2),
        (12, 3, 6, 2),
        (12, 3, 7, 1),
    ],
)
def test_as_many_units_may_leave_as_keep_the_least_channels(
    channels: int, division: int, least: int, limit: int
) -> None:
    whole = group(channels, division)
    assert ScoredGroup(whole, torch.zeros(whole.units)).limit(least) == limit
