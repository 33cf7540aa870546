"""Against the formulas written as loops, and against dcor."""

from __future__ import annotations

import math
import subprocess
import sys

import dcor
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dscore_plugin.criteria import energy
from dscore_plugin.criteria.energy import (
    ClassDistances,
    distance_correlation_sqr,
    distance_covariance_sqr,
    energy_distance,
    layer_energy,
)
from dscore_plugin.errors import CriterionError

sizes = st.integers(2, 6)
seeds = st.integers(0, 2**31)
exponents = st.sampled_from([0.3, 1.0, 1.7])
statistics = st.sampled_from(["v", "u"])
unhurried = settings(deadline=None, max_examples=40)


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def distance(a: list[float], b: list[float], exponent: float) -> float:
    return math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True))) ** exponent


def by_loops(x: Tensor, y: Tensor, exponent: float, statistic: str) -> float:
    a, b = x.flatten(1).tolist(), y.flatten(1).tolist()
    between = sum(distance(p, q, exponent) for p in a for q in b) / (len(a) * len(b))
    total = 2 * between
    for sample in (a, b):
        n = len(sample)
        pairs = n * n if statistic == "v" else n * (n - 1)
        total -= sum(distance(p, q, exponent) for p in sample for q in sample) / pairs
    return total


@unhurried
@given(sizes, sizes, sizes, st.integers(1, 3), exponents, statistics, seeds)
def test_the_double_loop(n, m, channels, side, exponent, statistic, seed):
    x, y = noise(seed, n, channels, side, side), noise(seed + 1, m, channels, side, side) + 0.5
    found = energy_distance(x, y, exponent, statistic)
    assert found == pytest.approx(by_loops(x, y, exponent, statistic), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, 1, 1), (1, 9, 3), (40, 33, 1), (120, 80, 200), (330, 280, 64), (6, 5, 20_000)]
)
def test_dcor(n, m, d, exponent):
    x, y = noise(0, n, d), 1.1 * noise(1, m, d) + 0.2
    for dtype, shift, precision in ((torch.float64, 0, 1e-9), (torch.float32, 57, 1e-5)):
        a, b = (x + shift).to(dtype), (y + shift).to(dtype)
        for statistic in ("v", "u")[: 1 if 1 in (n, m) else 2]:
            expected = dcor.energy_distance(
                a.double().numpy(), b.double().numpy(), exponent=exponent, estimation_stat=statistic
            )
            assert energy_distance(a, b, exponent, statistic) == pytest.approx(expected, rel=precision)


def test_what_cannot_be_told_apart_is_zero_and_a_vector_is_a_sample_of_numbers():
    x = noise(0, 30, 4)
    assert energy_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert energy_distance(torch.zeros(3), torch.ones(5)) == 2
    rows = torch.ones(600, 3)  # equal rows of a large float32 sample: nothing but the zeros of the diagonal
    assert energy_distance(rows[:300], rows[300:]) == 0


def test_a_class_far_from_the_others_loses_no_digits():
    x, y = noise(0, 400, 50).float(), noise(1, 300, 50).float() + 3000
    expected = dcor.energy_distance(x.double().numpy(), y.double().numpy())
    distances = ClassDistances(torch.arange(2).repeat_interleave(torch.tensor([400, 300])))
    distances.update(torch.cat([x, y]))
    assert distances.energy(standardize=False) == pytest.approx(expected, rel=1e-6)
    within = np.mean([np.linalg.norm(y.double().numpy() - row, axis=1).mean() for row in y.double().numpy()])
    assert distances._mean_within(1, 1.0, unbiased=False) == pytest.approx(within, rel=1e-5)


@unhurried
@given(st.lists(st.integers(-3, 3), min_size=6, max_size=14), exponents, statistics, st.booleans(), seeds)
def test_a_layer_is_compared_with_its_most_frequent_class(labels, exponent, statistic, standardize, seed):
    features, classes = noise(seed, len(labels), 3, 2), sorted(set(labels))
    rows = {c: [i for i, label in enumerate(labels) if label == c] for c in classes}
    reference = min(classes, key=lambda c: (-len(rows[c]), c))
    others = [c for c in classes if c != reference and (statistic == "v" or len(rows[c]) > 1)]
    if not others:
        with pytest.raises(CriterionError):
            layer_energy(features, torch.tensor(labels), statistic=statistic)
        return
    found = [by_loops(features[rows[reference]], features[rows[c]], exponent, statistic) for c in others]
    scale = 6 ** (exponent / 2) if standardize else 1
    options = {"exponent": exponent, "statistic": statistic, "standardize": standardize}
    for aggregate, expected in (("max", max(found)), ("mean", sum(found) / len(found))):
        score = layer_energy(features, torch.tensor(labels), aggregate=aggregate, **options)
        assert score == pytest.approx(expected / scale, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("measure", ["energy", "covariance", "correlation"])
def test_pieces_and_blocks_of_any_size_give_the_same(measure, monkeypatch):
    features, labels = noise(0, 40, 30), torch.arange(40) % 3
    whole = ClassDistances(labels, pairs="all")
    whole.update(features)
    for rows, piece, few in ((7, 100, 0), (64, 1, 512)):
        monkeypatch.setattr(energy, "_ROWS", rows)
        monkeypatch.setattr(energy, "_PIECE", piece)
        monkeypatch.setattr(energy, "_FEW", few)
        parts = ClassDistances(labels, pairs="all")
        parts.update(torch.full((40, 1), 5.0))
        parts.reset()
        for part in features.split(11, dim=1):
            parts.update(part)
        assert parts.elements == 30
        assert getattr(parts, measure)() == pytest.approx(getattr(whole, measure)(), rel=1e-12)


def test_neither_autocast_nor_a_fast_matmul_takes_digits_away():
    x, y = noise(0, 300, 200).float(), noise(1, 300, 200).float() + 0.1
    expected = energy_distance(x, y)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert energy_distance(x, y) == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_distance_covariance_and_correlation(exponent):
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 0, 5] * 5)
    features = noise(0, 40, 12) + labels[:, None]
    one_hot = (labels[:, None] == labels.unique()).double().numpy()
    apart = one_hot / 2 ** (1 / 2)  # rows of different classes lie 1 apart
    x = features.numpy()
    centred = [dcor.double_centered(dcor.distances.pairwise_distances(x, exponent=exponent))]
    centred.append(dcor.double_centered(dcor.distances.pairwise_distances(apart)))
    covariance = float(dcor.mean_product(*centred))
    scale = math.sqrt(
        float(dcor.mean_product(centred[0], centred[0])) * float(dcor.mean_product(*centred[1:] * 2))
    )
    assert distance_covariance_sqr(features, labels, exponent=exponent) == pytest.approx(covariance, rel=1e-9)
    assert distance_correlation_sqr(features, labels, exponent=exponent) == pytest.approx(covariance / scale)
    parts = [features[labels == c] for c in labels.unique()]
    shares = [(len(part) / 40) ** 2 * energy_distance(part, features, exponent) for part in parts]
    assert sum(shares) == pytest.approx(covariance, rel=1e-5)
    assert distance_correlation_sqr(torch.ones(40, 3), labels) == 0


MEMORY = """
import resource, torch
from dscore_plugin.criteria.energy import layer_energy
features, labels = torch.randn(48, 10**6), torch.arange(48) % 10
layer_energy(features[:, :1000], labels)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
score = layer_energy(features, labels)
print(score, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_a_layer_of_a_million_elements_takes_the_memory_that_is_stated():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    score, mebibytes = map(float, done.stdout.split())
    assert 0 < score < 1  # of two samples of 5, which V-statistics find apart
    assert mebibytes < 256


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: energy_distance(torch.ones(0, 2), torch.ones(3, 2)), "x is an empty sample"),
        (lambda: energy_distance(torch.ones(3, 2), torch.ones(3, 3)), "the rows of x and y differ"),
        (lambda: energy_distance(torch.ones(3, 2), torch.ones(1, 2), 1, "u"), "y has one"),
        (lambda: energy_distance(torch.ones(3, 2), torch.ones(3, 2), 2.0), "exponent must lie between"),
        (lambda: energy_distance(torch.ones(3, 2), torch.ones(3, 2), 1, "w"), "statistic 'w' is unknown"),
        (lambda: layer_energy(torch.full((4, 2), math.nan), torch.arange(4)), "NaN or infinity"),
        (lambda: layer_energy(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64)), "are of one class"),
        (lambda: layer_energy(torch.ones(4, 2), torch.arange(3)), "features of 3 images"),
        (lambda: layer_energy(torch.ones(4, 2, dtype=torch.int64), torch.arange(4)), "floating-point"),
        (lambda: layer_energy(torch.ones(4, 2), torch.ones(4)), "int64"),
        (lambda: layer_energy(torch.ones(4, 2), torch.arange(4), aggregate="all"), "aggregate 'all'"),
        (lambda: ClassDistances(torch.arange(4)).energy(), "no features were added"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(CriterionError, match=message):
        call()
