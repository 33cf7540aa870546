from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch

from dscore_plugin.criteria.coarse import draw_leaving, misclassification_rate, places
from dscore_plugin.errors import CriterionError


def numbers(n: int, draws: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(draws, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chi_square(drawn: list[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    counts = {subset: drawn.count(subset) for subset in expected}
    assert sum(counts.values()) == len(drawn)
    return sum((counts[s] - len(drawn) * p) ** 2 / (len(drawn) * p) for s, p in expected.items())


def test_every_subset_is_equally_likely() -> None:
    drawn = [tuple(draw_leaving(u, 3).tolist()) for u in numbers(6, 6000)]
    expected = dict.fromkeys(combinations(range(6), 3), 1 / 20)
    assert chi_square(drawn, expected) < 50.8  # 19 degrees of freedom, p = 1e-4


def test_with_scores_units_leave_one_after_the_other_by_their_weights() -> None:
    scores, temperature = torch.tensor([3.0, -1.0, 100.0, 0.5]), 0.4
    weights = torch.exp(-torch.tensor([2, 0, 3, 1]) / 3 / temperature).tolist()  # by place in the order

    def chance(order: tuple[int, ...]) -> float:
        left, probability = sum(weights), 1.0
        for unit in order:
            probability, left = probability * weights[unit] / left, left - weights[unit]
        return probability

    expected = {s: sum(chance(order) for order in permutations(s)) for s in combinations(range(4), 2)}
    drawn = [tuple(draw_leaving(u, 2, scores, temperature).tolist()) for u in numbers(4, 6000)]
    assert chi_square(drawn, expected) < 25.7  # 5 degrees of freedom, p = 1e-4


def test_the_temperature_leads_from_the_criterion_to_a_uniform_draw() -> None:
    scores = torch.tensor([0.4, 0.1, 0.1, 0.9, 0.7, 0.2])
    for u in numbers(6, 20):
        assert draw_leaving(u, 3, scores, 1e-6).tolist() == [1, 2, 5]
        assert draw_leaving(u, 3, scores, 1e9).tolist() == draw_leaving(u, 3).tolist()


def test_places() -> None:
    assert places(torch.tensor([5.0, -1.0, 5.0, 0.0, 9.0])).tolist() == [0.5, 0, 0.75, 0.25, 1]
    assert places(torch.tensor([7.0])).tolist() == [0]


def test_misclassification_rate() -> None:
    assert misclassification_rate(870, 1000) == 13.0


@pytest.mark.parametrize(
    ("count", "scores", "temperature", "message"),
    [
        (5, None, 0.1, "0 to 4 units"),
        (-1, None, 0.1, "0 to 4 units"),
        (2, torch.zeros(4), 0.0, "temperature above 0"),
        (2, torch.zeros(3), 0.1, "one number for each unit"),
    ],
)
def test_refusals(count: int, scores: torch.Tensor | None, temperature: float, message: str) -> None:
    with pytest.raises(CriterionError, match=message):
        draw_leaving(torch.rand(4), count, scores, temperature)
