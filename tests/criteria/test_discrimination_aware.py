from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from dscore_plugin.criteria.discrimination_aware import channel_scores, has_settled, joint_loss
from dscore_plugin.errors import CriterionError


def literal(gradient: torch.Tensor, reading: str) -> list[float]:
    """Both readings of ||G_j||_F, number by number."""
    outputs, channels, *_ = gradient.shape
    scores = []
    for k in range(channels):
        squares = [sum(float(x) ** 2 for x in gradient[j, k].flatten()) for j in range(outputs)]
        scores.append(sum(map(math.sqrt, squares)) if reading == "kernels" else math.sqrt(sum(squares)))
    return scores


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(3, 4), (2, 3, 5), (4, 3, 3, 3), (1, 2, 1, 1)]),
    reading=st.sampled_from(["kernels", "slice"]),
    seed=st.integers(0, 99),
)
def test_scores_are_those_of_the_definition(shape: tuple[int, ...], reading: str, seed: int) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(channel_scores(gradient, reading), torch.tensor(literal(gradient, reading)))


def test_the_readings_order_channels_differently() -> None:
    spread, peak = torch.tensor([[3.0], [3.0]]), torch.tensor([[5.0], [0.0]])
    gradient = torch.stack([spread, peak], dim=1)
    assert channel_scores(gradient, "kernels").argmax() == 0
    assert channel_scores(gradient, "slice").argmax() == 1


def test_the_joint_loss_is_the_mean_squared_error_and_lambda_times_the_cross_entropy() -> None:
    torch.manual_seed(0)
    output, reference = torch.randn(2, 4, 3, 2, 2)
    logits, labels = torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    error = (
        sum(float((a - b) ** 2) for a, b in zip(output.flatten(), reference.flatten(), strict=True))
        / output.numel()
    )
    expected = error + 0.3 * float(functional.cross_entropy(logits, labels))
    assert float(joint_loss(output, reference, logits, labels, 0.3)) == pytest.approx(expected, rel=1e-5)
    assert float(joint_loss(output, reference, None, labels, 0.0)) == pytest.approx(error, rel=1e-5)


def test_the_stop_rule_is_relative_to_the_loss_without_channels() -> None:
    assert has_settled(2.0, 1.991, 10.0, 0.001)
    assert has_settled(1.991, 2.0, 10.0, 0.001)
    assert not has_settled(2.0, 1.98, 10.0, 0.001)


@pytest.mark.parametrize(
    ("gradient", "reading", "message"),
    [
        (torch.ones(3), "kernels", "outputs, inputs"),
        (torch.ones(3, 2, dtype=torch.int64), "kernels", "floating-point"),
        (torch.full((2, 2), float("nan")), "kernels", "NaN or infinity"),
        (torch.ones(2, 2), "slices", "did you mean 'slice'"),
    ],
)
def test_bad_input_is_refused(gradient: torch.Tensor, reading: str, message: str) -> None:
    with pytest.raises(CriterionError, match=message):
        channel_scores(gradient, reading)
