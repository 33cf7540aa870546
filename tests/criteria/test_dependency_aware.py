"""Against the paper's formulas, written as loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dscore_plugin.criteria.dependency_aware import (
    dependency_aware,
    final_threshold,
    sparsity,
    survivors,
)
from dscore_plugin.errors import BudgetError, CriterionError

sizes = st.integers(1, 4)
seeds = st.integers(0, 2**31)
unhurried = settings(deadline=None, max_examples=50)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_loops(gamma: Tensor, weight: Tensor, groups: int) -> list[float]:
    outputs, inputs, height, width = weight.shape
    scores = []
    for channel in range(len(gamma)):
        group, place = divmod(channel, inputs)
        total, count = 0.0, 0
        for o in range(outputs):
            if o // (outputs // groups) != group:
                continue
            for i in range(height):
                for j in range(width):
                    total += abs(float(weight[o, place, i, j]))
                    count += 1
        scores.append(abs(float(gamma[channel])) * total / count)
    return scores


@unhurried
@given(sizes, sizes, sizes, sizes, st.integers(1, 3), seeds)
def test_convolutions_of_any_number_of_groups(outputs, inputs, height, width, groups, seed):
    gamma = noise(seed, groups * inputs)
    weight = noise(seed + 1, groups * outputs, inputs, height, width)
    expected = torch.tensor(by_loops(gamma, weight, groups))
    torch.testing.assert_close(dependency_aware(gamma, weight), expected)


@unhurried
@given(sizes, sizes, sizes, seeds)
def test_a_linear_layer_behind_a_flatten_averages_over_the_positions(outputs, channels, positions, seed):
    gamma, weight = noise(seed, channels), noise(seed + 1, outputs, channels * positions)
    expected = []
    for channel in range(channels):
        columns = range(channel * positions, (channel + 1) * positions)
        values = [abs(float(weight[o, column])) for o in range(outputs) for column in columns]
        expected.append(abs(float(gamma[channel])) * sum(values) / len(values))
    torch.testing.assert_close(dependency_aware(gamma, weight), torch.tensor(expected))


def test_the_sign_of_a_scale_does_not_matter_and_half_precision_is_taken():
    gamma, weight = noise(0, 4), noise(1, 3, 4, 3, 3)
    scores = dependency_aware(gamma, weight)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, dependency_aware(-gamma, -weight))
    halves = dependency_aware(gamma.bfloat16(), weight.bfloat16())
    torch.testing.assert_close(halves, scores, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(
    ("gamma", "weight", "message"),
    [
        (torch.ones(2, 2), torch.ones(3, 2, 1, 1), r"scales of shape \(n,\)"),
        (torch.ones(2, dtype=torch.int64), torch.ones(3, 2, 1, 1), "floating-point scales"),
        (torch.ones(2), torch.ones(3), "weight of a convolution"),
        (torch.ones(0), torch.ones(3, 0, 1, 1), "weight of a convolution"),
        (torch.ones(5), torch.ones(4, 2, 1, 1), "5 channels do not fit"),
        (torch.ones(6), torch.ones(4, 2, 1, 1), "6 channels do not fit"),  # 3 groups, but 4 filters
        (torch.ones(4), torch.ones(3, 6), "4 channels do not fit"),
        (torch.ones(2), torch.full((3, 2, 1, 1), float("nan")), "NaN or infinity"),
        (torch.tensor([1.0, float("inf")]), torch.ones(3, 2, 1, 1), "NaN or infinity"),
    ],
)
def test_what_cannot_be_scored_is_refused(gamma, weight, message):
    with pytest.raises(CriterionError, match=message):
        dependency_aware(gamma, weight)


layers = st.lists(st.lists(st.floats(0, 10, width=32), min_size=1, max_size=12), min_size=1, max_size=4)


@unhurried
@given(layers, st.floats(0, 1))
def test_sparsity_counts_what_lies_below_a_share_of_each_layers_own_maximum(values, threshold):
    scores = [torch.tensor(layer, dtype=torch.float64) for layer in values]
    below = sum(1 for layer in values for score in layer if score <= threshold * max(layer))
    assert sparsity(scores, threshold) == below / sum(map(len, values))


@unhurried
@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.floats(0, 1), seeds)
def test_the_final_threshold_meets_the_target(widths, share, seed):
    # every layer's best channel lies at its maximum: they all go together, at a threshold of 1
    target = share * (1 - len(widths) / sum(widths))
    scores = [noise(seed + place, width).abs() for place, width in enumerate(widths)]
    threshold = final_threshold(scores, target)
    assert abs(sparsity(scores, threshold) - target) <= max(0.001, 0.5 / sum(widths)) + 1e-9
    assert 0 <= threshold <= 1


def test_where_equal_scores_leave_a_gap_the_nearest_share_is_taken():
    scores = [torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0])]
    assert sparsity(scores, final_threshold(scores, 0.3)) == 0.0
    assert sparsity(scores, final_threshold(scores, 0.5)) == 0.8
    dead = [torch.tensor([0.0, 0.0, 0.0, 1.0])]
    assert sparsity(dead, final_threshold(dead, 0.25)) == 0.75
    assert sparsity([torch.zeros(4)], final_threshold([torch.zeros(4)], 0.25)) == 1.0


@pytest.mark.parametrize("target", [-0.1, 1.1, float("nan")])
def test_a_target_out_of_range_is_refused(target):
    with pytest.raises(BudgetError, match="between 0 and 1"):
        final_threshold([torch.ones(3)], target)


def test_no_channels_have_no_sparsity():
    with pytest.raises(CriterionError, match="no scored channels"):
        final_threshold([], 0.5)


@unhurried
@given(st.integers(1, 30), st.floats(0, 1), st.integers(1, 10), seeds)
def test_survivors_are_those_above_the_threshold_or_the_best_few(width, threshold, min_channels, seed):
    scores = noise(seed, width).abs()
    stay = survivors(scores, threshold, min_channels)
    above = [float(score) > threshold * float(scores.max()) for score in scores]
    if sum(above) >= min_channels:
        assert stay.tolist() == above
    else:
        assert int(stay.sum()) == min(min_channels, width)
        assert scores[stay].min() >= (scores[~stay].max() if not stay.all() else 0)


def test_a_dead_layer_keeps_its_last_channels():
    assert survivors(torch.zeros(4), 0.5, 1).tolist() == [False, False, False, True]
