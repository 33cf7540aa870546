"""Synaptic strength against a transcription of eq. 6, kernel by kernel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dscore_plugin.criteria.synaptic_strength import input_strength, synaptic_strength
from dscore_plugin.errors import CriterionError


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 100))
def test_every_connection_has_gamma_times_the_norm_of_its_kernel(
    groups: int, outputs: int, inputs: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups * outputs, inputs, 3, 2, generator=generator)
    gamma = torch.randn(groups * inputs, generator=generator)
    strength = synaptic_strength(weight, gamma)
    read = [0.0] * len(gamma)
    for o in range(groups * outputs):
        for c in range(inputs):
            channel = o // outputs * inputs + c
            norm = math.sqrt(sum(float(w) ** 2 for row in weight[o, c] for w in row))
            assert float(strength[o, c]) == pytest.approx(float(gamma[channel]) * norm, rel=1e-5, abs=1e-7)
            read[channel] += abs(float(gamma[channel])) * norm
    assert input_strength(strength, groups).tolist() == pytest.approx(read, rel=1e-5, abs=1e-6)


def test_without_a_norm_gamma_is_one_and_a_weight_of_a_linear_layer_is_a_kernel() -> None:
    assert synaptic_strength(torch.tensor([[[[3.0, 4.0]]]])).tolist() == [[5.0]]
    assert synaptic_strength(torch.tensor([[-2.0, 3.0]]), torch.tensor([-1.0, 2.0])).tolist() == [[-2.0, 6.0]]


def test_a_half_precision_weight_is_squared_without_overflow() -> None:
    weight = torch.full((1, 1, 1, 2), 6e4, dtype=torch.float16)
    assert float(synaptic_strength(weight)) == pytest.approx(6e4 * math.sqrt(2), rel=1e-3)


@pytest.mark.parametrize(
    ("weight", "gamma", "message"),
    [
        (torch.ones(4), None, "weight of a convolution"),
        (torch.ones(4, 2, 1, 1, dtype=torch.int64), None, "weight of a convolution"),
        (torch.ones(4, 2, 3, 3), torch.ones(3), "do not fit"),
        (torch.ones(4, 2, 3, 3), torch.ones(6), "do not fit"),  # three groups of four outputs
        (torch.full((1, 1, 1, 1), float("nan")), None, "NaN"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    weight: torch.Tensor, gamma: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(CriterionError, match=message):
        synaptic_strength(weight, gamma)
