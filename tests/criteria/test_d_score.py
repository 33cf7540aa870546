"""The criteria against the paper's procedures, written out as it words them, in plain Python and exact sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dscore_plugin.criteria.d_score import d_score, d_step, d_step_gm, rank, signed_mass, summed_distances
from dscore_plugin.errors import CriterionError

CRITERIA = (d_score, d_step, d_step_gm)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = {  # what one filter is
    "conv1d": (5, 3),
    "conv2d": (3, 3, 3),
    "conv3d": (2, 2, 2, 3),
    "grouped": (2, 3, 3),
    "depthwise": (1, 3, 3),
    "pointwise": (9, 1, 1),
    "scalar": (1, 1, 1),
    "linear": (17,),
}
Filters = list[list[float]]


@st.composite
def layers(draw: st.DrawFn, most: int = 16) -> Tensor:
    """Filters of a random layer: small integers (exact ties), normal numbers, or either with copies of filters."""
    n = draw(st.integers(1, most))
    shape = (n, *SHAPES[draw(st.sampled_from(sorted(SHAPES)))])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        weight = torch.randint(-2, 3, shape, generator=generator).double()
    else:
        weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        weight = weight[torch.randint(0, n, (n,), generator=generator)]
    return weight.to(draw(st.sampled_from(DTYPES)))


def rows(weight: Tensor) -> Filters:
    flat: Filters = weight.double().flatten(1).tolist()
    return flat


def one_sign(filters: Filters, sign: int) -> Filters:
    """F = F+ + F- (Eq. 1): one of the two, the other sign's weights at zero, as magnitudes."""
    return [[max(sign * weight, 0.0) for weight in one] for one in filters]


def masses(filters: Filters, sign: int) -> list[float]:
    return [math.fsum(one) for one in one_sign(filters, sign)]


def summed(filters: Filters, sign: int) -> list[float]:
    points = one_sign(filters, sign)
    return [math.fsum(math.dist(here, there) for there in points) for here in points]


def from_closest_to_zero(values: Sequence[float]) -> list[int]:
    """Sort filters; the sums of square roots that are equal in exact arithmetic count as equal: lower index first."""
    order = sorted(range(len(values)), key=lambda filter_: values[filter_])
    level, levels = 0, {order[0]: 0}
    for before, after in zip(order, order[1:], strict=False):
        level += values[after] - values[before] > 1e-10 * max(values)
        levels[after] = level
    return sorted(order, key=lambda filter_: (levels[filter_], filter_))


def dynamic_score(filters: Filters, count: int) -> set[int]:
    """Scores 1..j by position in both sorted lists, added; the small overall scores are pruned."""
    scores = [0] * len(filters)
    for sign in (1, -1):
        for position, filter_ in enumerate(from_closest_to_zero(masses(filters, sign)), start=1):
            scores[filter_] += position
    return set(sorted(range(len(filters)), key=lambda filter_: (scores[filter_], filter_))[:count])


def dynamic_step(measure: Callable[[Filters, int], list[float]], filters: Filters, count: int) -> set[int]:
    """Grow a prefix of both sorted lists until the filters that lie in both fill the buffer."""
    positive, negative = (from_closest_to_zero(measure(filters, sign)) for sign in (1, -1))
    buffer: set[int] = set()
    for j in range(1, len(filters) + 1):
        entering = (set(positive[:j]) & set(negative[:j])) - buffer
        if len(buffer | entering) < count:
            buffer |= entering
            continue
        by_sum = sorted(entering, key=lambda f: (positive.index(f) + negative.index(f), f))
        return buffer | set(by_sum[: count - len(buffer)])
    raise AssertionError("the last prefix holds every filter")


REFERENCES: dict[Callable[[Tensor], Tensor], Callable[[Filters, int], set[int]]] = {
    d_score: dynamic_score,
    d_step: lambda filters, count: dynamic_step(masses, filters, count),
    d_step_gm: lambda filters, count: dynamic_step(summed, filters, count),
}


def pruned(scores: Tensor, count: int) -> set[int]:
    return set(torch.argsort(scores, stable=True)[:count].tolist())


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.__name__)
@given(weight=layers())
@settings(max_examples=1000, deadline=None)
def test_every_pruned_set_is_that_of_the_paper(criterion: Callable[[Tensor], Tensor], weight: Tensor) -> None:
    scores, filters = criterion(weight), rows(weight)
    assert scores.shape == (len(weight),)
    assert scores.dtype == torch.float32
    assert float(scores.min()) >= 0
    assert float(scores.max()) <= 1
    for count in range(1, len(weight) + 1):
        assert pruned(scores, count) == REFERENCES[criterion](filters, count)


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.__name__)
@given(weight=layers(), exponent=st.integers(-300, 300))
@settings(max_examples=200, deadline=None)
def test_scale_does_not_matter(criterion: Callable[[Tensor], Tensor], weight: Tensor, exponent: int) -> None:
    weight = weight.double()
    assert torch.equal(criterion(weight), criterion(weight * 2.0**exponent))


@pytest.mark.parametrize("exponent", [-120, -90, 90, 110])
@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.__name__)
def test_scale_does_not_matter_in_wide_float32_layers(
    criterion: Callable[[Tensor], Tensor], exponent: int
) -> None:
    weight = torch.randn(200, 40, generator=torch.Generator().manual_seed(0))
    weight = weight.clamp(min=2**-4) * weight.sign()
    assert torch.equal(criterion(weight), criterion(weight * 2.0**exponent))


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.__name__)
@given(weight=layers())
@settings(max_examples=200, deadline=None)
def test_swapping_the_signs_changes_nothing(criterion: Callable[[Tensor], Tensor], weight: Tensor) -> None:
    plus, minus = signed_mass(weight)
    assert torch.equal(torch.stack((minus, plus)), signed_mass(-weight))
    assert torch.equal(criterion(weight), criterion(-weight))


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.__name__)
@given(seed=st.integers(0, 10_000), n=st.integers(3, 40))
@settings(max_examples=200, deadline=None)
def test_scores_move_with_their_filters(criterion: Callable[[Tensor], Tensor], seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, 9, generator=generator, dtype=torch.float64)
    order = torch.randperm(n, generator=generator)
    measures = [measured(criterion)(rows(weight), sign) for sign in (1, -1)]
    assume(all(len(set(one)) == n for one in measures))
    first, second = torch.tensor(measures, dtype=torch.float64)
    steps = torch.maximum(rank(first), rank(second)) * 2 * n + rank(first) + rank(second)
    keys = rank(first) + rank(second) if criterion is d_score else steps
    here, there = torch.argsort(criterion(weight)), order[torch.argsort(criterion(weight[order]))]
    assert torch.equal(keys[here], keys[there])  # filters with equal keys may change places


def measured(criterion: Callable[[Tensor], Tensor]) -> Callable[[Filters, int], list[float]]:
    return summed if criterion is d_step_gm else masses


@given(weight=layers())
@settings(max_examples=300, deadline=None)
def test_ranks_are_divided_once(weight: Tensor) -> None:
    n = len(weight)
    ranks = d_score(weight).double() * 2 * max(1, n - 1)
    assert torch.allclose(ranks, ranks.round(), atol=1e-4)
    sums = rank(signed_mass(weight)).sum(dim=0)
    for value in sums.unique():
        assert len(d_score(weight)[sums == value].unique()) == 1


def test_equal_rank_sums_stay_equal_scores() -> None:
    weight = torch.tensor([[1.0, -3.0], [2.0, -2.0], [3.0, -1.0]])
    assert d_score(weight).tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("criterion", [d_step, d_step_gm])
@given(weight=layers())
@settings(max_examples=200, deadline=None)
def test_steps_are_distinct_positions(criterion: Callable[[Tensor], Tensor], weight: Tensor) -> None:
    n = len(weight)
    expected = torch.arange(n) / max(1, n - 1)
    assert torch.equal(criterion(weight).sort().values, expected)


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.__name__)
@pytest.mark.parametrize("weight", [torch.randn(1, 3, 3, 3), torch.zeros(1, 4), torch.randn(1, 1)])
def test_a_single_filter_scores_zero(criterion: Callable[[Tensor], Tensor], weight: Tensor) -> None:
    assert criterion(weight).tolist() == [0.0]


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.__name__)
def test_equal_filters_go_by_index(criterion: Callable[[Tensor], Tensor]) -> None:
    for weight in (torch.zeros(7, 4), torch.randn(1, 3, 3).expand(300, 3, 3), torch.ones(500, 2)):
        scores = criterion(weight)
        assert torch.argsort(scores, stable=True).tolist() == list(range(len(weight)))


def test_zeros_count_for_neither_sign() -> None:
    with_zeros = torch.tensor([[1.0, 0.0, -2.0], [0.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    plus, minus = signed_mass(with_zeros)
    assert plus.tolist() == [1.0, 0.0, 3.0]
    assert minus.tolist() == [2.0, 0.0, 0.0]


def test_a_small_layer_by_hand() -> None:
    # F+ = (5, 1, 3, 2), F- = (1, 4, 2, 3): ranks (3, 0, 2, 1) and (0, 3, 1, 2)
    weight = torch.tensor([[5.0, -1.0], [1.0, -4.0], [3.0, -2.0], [2.0, -3.0]])
    assert torch.allclose(d_score(weight), torch.tensor([3, 3, 3, 3]) / 6)
    # the buffers reach 2 and 3 at the third step, both with the sum 3; then 0 and 1
    assert torch.allclose(d_step(weight), torch.tensor([2, 3, 0, 1]) / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.__name__)
def test_half_precision_is_ranked_in_float32(
    criterion: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    weight = torch.randn(64, 40, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(criterion(weight), criterion(weight.float()))
    assert (weight.abs().sum((1, 2, 3), dtype=torch.float32) > 100).all()  # half precision would round this


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3),
        nn.Conv2d(4, 6, 3),
        nn.Conv3d(4, 6, 3),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Linear(4, 6),
    ],
)
@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.__name__)
def test_parameters_are_scored_and_left_alone(
    criterion: Callable[[Tensor], Tensor], layer: nn.Module
) -> None:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    before = weight.detach().clone()
    scores = criterion(weight)
    assert scores.shape == (6,)
    assert not scores.requires_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.__name__)
def test_memory_layout_does_not_matter(criterion: Callable[[Tensor], Tensor]) -> None:
    weight = torch.randn(6, 16, 3, 3)
    assert torch.equal(criterion(weight), criterion(weight.to(memory_format=torch.channels_last)))
    transposed = weight.transpose(0, 1)  # as the filters of a transposed convolution lie
    assert torch.equal(criterion(transposed), criterion(transposed.contiguous()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (200, 30)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.__name__)
def test_weights_that_are_no_numbers_are_refused(
    criterion: Callable[[Tensor], Tensor], dtype: torch.dtype, shape: tuple[int, ...], bad: float
) -> None:
    weight = torch.randn(shape).to(dtype)
    weight.view(-1)[5] = bad
    with pytest.raises(CriterionError, match="NaN or infinity"):
        criterion(weight)


@pytest.mark.parametrize(
    "weight", [torch.randn(4), torch.tensor(1.0), torch.ones(4, 3, dtype=torch.int64), torch.ones(4, 3) > 0]
)
@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: criterion.__name__)
def test_what_holds_no_filters_is_refused(criterion: Callable[[Tensor], Tensor], weight: Tensor) -> None:
    with pytest.raises(CriterionError, match="at least two dimensions"):
        criterion(weight)


@pytest.mark.parametrize(("n", "d"), [(127, 64), (128, 64), (129, 64), (257, 30), (400, 9), (64, 600)])
def test_wide_layers_are_summed_tile_by_tile(n: int, d: int) -> None:
    points = torch.randn(2, n, d, generator=torch.Generator().manual_seed(n))
    exact = torch.cdist(points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist").sum(2)
    assert torch.allclose(summed_distances(points), exact, rtol=1e-6)


def test_equal_filters_of_a_wide_layer_are_at_equal_distances() -> None:
    points = torch.randint(-3, 4, (1, 300, 20), generator=torch.Generator().manual_seed(0)).float()
    points[:, 150:] = points[:, :150]
    total = summed_distances(points)[0]
    assert torch.equal(total[150:], total[:150])


def test_ranks_are_a_permutation_with_ties_by_index() -> None:
    assert rank(torch.tensor([2.0, 1.0, 2.0, 0.0])).tolist() == [2, 1, 3, 0]
    assert rank(torch.zeros(0)).tolist() == []
    assert rank(torch.tensor([[3.0, 1.0], [0.0, 0.0]])).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("legacy", [False, True])
def test_distances_are_taken_in_full_precision_whatever_is_set(
    legacy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if legacy:  # torch before 2.9
        monkeypatch.delattr(type(torch.backends.mkldnn), "matmul", raising=False)
    weight = torch.randn(160, 128, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = d_step_gm(weight)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(d_step_gm(weight), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
def test_a_precision_set_for_one_device_alone_is_no_obstacle() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # now torch refuses to say what holds for all
    try:
        d_step_gm(torch.randn(160, 128, 3, 3))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
