"""Energy statistics: how much a layer's feature map depends on the class.

Source: Soltani et al., *On the Energy Statistics of Feature Maps in Pruning of Neural Networks with
Skip-Connections*, arXiv 2201.11209; the statistics are Szekely and Rizzo's.

Euclidean distances come from Gram matrices, a few columns of the feature map at a time, so that a map may come in
pieces and never needs to lie in memory at once: :class:`ClassDistances` adds the pieces up in float64. Distances do
not change when both samples are shifted, so each piece is centred before its Gram matrix is taken; of a sample's
distances to itself only the upper triangle is used, and the zeros of its diagonal are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from dscore_plugin.criteria.precision import full_precision
from dscore_plugin.errors import CriterionError

Statistic = Literal["v", "u"]
Aggregate = Literal["max", "mean"]
Pairs = Literal["reference", "all"]

_ROWS = 256  # of a Gram matrix at a time; below the diagonal whole blocks of so many rows are left out
_FEW = 512  # images: then no averaging hides the rounding of float32, and float64 costs little
_PIECE = 2**24  # float32 elements of the feature maps that are centred and multiplied at a time: 64 MiB


def energy_distance(x: Tensor, y: Tensor, exponent: float = 1.0, statistic: str = "v") -> float:
    """Measure how far apart two distributions are; 0 if and only if they are the same.

    ``2 mean ||x - y||^a - mean ||x - x'||^a - mean ||y - y'||^a`` with Euclidean norms, and no square root.

    Args:
        x: one sample, shape ``(n, ...)``; further dimensions are flattened. Any float dtype, any device.
        y: another sample, shape ``(m, ...)``, as many elements in each row.
        exponent: ``a``, between 0 and 2 (exclusive).
        statistic: ``"v"`` divides a sample's distances to itself by ``n^2``, zeros included; ``"u"`` by
            ``n (n - 1)``, which makes the estimate unbiased, and negative now and then.

    Returns:
        The distance, in the samples' unit to the power ``exponent``.

    Raises:
        CriterionError: if a sample is empty, holds NaN or infinity, or is no floating-point tensor; if the rows
            differ in length, an option is out of range, or ``"u"`` gets a sample of one row.

    Source: the V-statistic of exponent 1 is what the authors' code computes; checked against ``dcor``.
    """
    for name, sample in (("x", x), ("y", y)):
        if sample.ndim < 1 or len(sample) == 0:
            raise CriterionError(f"{name} is an empty sample; expected shape (n, ...) with n >= 1")
        if statistic == "u" and len(sample) < 2:
            raise CriterionError(f"the U-statistic needs two rows; {name} has one (use statistic='v')")
    if math.prod(x.shape[1:]) != math.prod(y.shape[1:]):
        raise CriterionError(
            f"the rows of x and y differ: {tuple(x.shape)} and {tuple(y.shape)}; expected equal shapes but for n"
        )
    labels = torch.arange(2).repeat_interleave(torch.tensor([len(x), len(y)]))
    both = torch.cat([x.reshape(len(x), -1), y.reshape(len(y), -1)])
    return layer_energy(both, labels, exponent=exponent, statistic=statistic, standardize=False)


def layer_energy(
    features: Tensor,
    labels: Tensor,
    *,
    exponent: float = 1.0,
    statistic: str = "v",
    standardize: bool = True,
    aggregate: str = "max",
) -> float:
    """Score a layer by the energy distances between the feature maps of one class and of the others.

    The reference is the most frequent class (the lowest of several). The score is the largest energy distance
    between it and any other class, divided by ``sqrt(d)`` where ``d`` is the number of elements of the map: without
    this, narrow layers get small scores.

    Args:
        features: feature maps of the images, shape ``(n, ...)``; further dimensions are flattened.
        labels: a class for each image, int64, shape ``(n,)``; predicted or true.
        exponent: of the distances, between 0 and 2 (exclusive); the division is by ``d ** (exponent / 2)``.
        statistic: ``"v"`` or ``"u"``, see :func:`energy_distance`; ``"u"`` leaves classes of one image out.
        standardize: divide by ``sqrt(d)``.
        aggregate: ``"max"`` over the other classes, as the authors' code does, or ``"mean"``, as its comment says.

    Returns:
        The score; higher means that the layer tells the classes apart better.

    Raises:
        CriterionError: if there are fewer than two classes, the features hold NaN or infinity, the shapes do not
            agree, or an option is out of range.

    Source: arXiv 2201.11209; the class in question is the *predicted* one by its abstract, the true one in code.
    """
    distances = ClassDistances(labels)
    distances.update(features)
    return distances.energy(
        exponent=exponent, statistic=statistic, standardize=standardize, aggregate=aggregate
    )


def distance_covariance_sqr(features: Tensor, labels: Tensor, *, exponent: float = 1.0) -> float:
    """Measure the dependence of feature maps and classes by squared distance covariance.

    The other way to read "energy statistics": Euclidean distances between feature maps, and the distance of two
    classes is 0 or 1. It is the sum over the classes of ``p_k^2`` times the energy distance between class k, which
    has the share ``p_k`` of the images, and all images.

    Args:
        features: feature maps, shape ``(n, ...)``.
        labels: a class for each, int64, shape ``(n,)``.
        exponent: of the distances of feature maps, between 0 and 2 (exclusive).

    Returns:
        dCov^2 (V-statistic), in the features' unit to the power ``exponent``; 0 if they are independent.

    Raises:
        CriterionError: as for :func:`layer_energy`.

    Source: Szekely, Rizzo and Bakirov, *Measuring and Testing Dependence by Correlation of Distances*, 0803.4101.
    """
    distances = ClassDistances(labels, pairs="all")
    distances.update(features)
    return distances.covariance(exponent)


def distance_correlation_sqr(features: Tensor, labels: Tensor, *, exponent: float = 1.0) -> float:
    """Measure the dependence of feature maps and classes by squared distance correlation, in ``[0, 1]``.

    Arguments, errors and source are those of :func:`distance_covariance_sqr`; the result has no unit.
    """
    distances = ClassDistances(labels, pairs="all")
    distances.update(features)
    return distances.correlation(exponent)


class ClassDistances:
    """Euclidean distances within and between the classes of a sample whose feature maps come in pieces.

    Memory: 8 bytes for each pair of images that is compared, at most ``8 n^2``, and about 256 MiB while a piece is
    added, all on the device of the pieces.

    Args:
        labels: a class for each image, int64, shape ``(n,)``.
        pairs: ``"reference"`` compares each class with itself and with the most frequent one, which energy distances
            need; ``"all"`` also compares all others, which covariances need.

    Attributes:
        classes: the classes that are present, ascending.
        reference: the most frequent class; of several, the lowest.
        elements: of a feature map, as far as they have been added.

    Raises:
        CriterionError: if the labels are no int64 vector, or of fewer than two classes.
    """

    def __init__(self, labels: Tensor, *, pairs: Pairs = "reference") -> None:
        if labels.ndim != 1 or labels.dtype != torch.int64:
            raise CriterionError(
                f"expected labels of shape (n,), int64; got {tuple(labels.shape)}, {labels.dtype}"
            )
        found, counts = torch.unique(labels.cpu(), return_counts=True)
        if len(found) < 2:
            raise CriterionError(
                f"all {len(labels)} images are of one class, which leaves nothing to compare; take more images, or "
                "the true labels"
            )
        self.classes: tuple[int, ...] = tuple(found.tolist())
        self.counts: tuple[int, ...] = tuple(counts.tolist())
        self.reference = self.classes[self.counts.index(max(self.counts))]
        self.elements = 0
        self._order = torch.argsort(labels.cpu(), stable=True)
        self._starts = [sum(self.counts[:place]) for place in range(len(self.counts) + 1)]
        self._pairs = tuple(self._compared(pairs))
        self._squares: dict[tuple[int, int], Tensor] = {}

    def _compared(self, pairs: Pairs) -> Iterator[tuple[int, int]]:
        places = range(len(self.classes))
        reference = self.classes.index(self.reference)
        for a in places:
            for b in places[a:]:
                if a == b or pairs == "all" or reference in (a, b):
                    yield a, b

    def reset(self) -> None:
        """Forget the feature maps."""
        self.elements = 0
        self._squares.clear()

    def update(self, features: Tensor) -> None:
        """Add a piece of the feature maps: some of their elements, of all images.

        Args:
            features: shape ``(n, ...)``, in the labels' order; further dimensions are flattened.

        Raises:
            CriterionError: if there are more or fewer images than labels, or NaN or infinity.
        """
        features = self._checked(features)
        order = self._order.to(features.device)
        exact = len(order) <= _FEW or features.dtype == torch.float64
        width = max(1, _PIECE // (len(order) * (2 if exact else 1)))
        with torch.no_grad(), full_precision(features.device.type):
            for piece in features.split(width, dim=1):
                rows = piece.index_select(0, order).to(torch.float64 if exact else torch.float32)
                self._add(rows.sub_(rows.mean(dim=0)))
        self.elements += features.shape[1]

    def _checked(self, features: Tensor) -> Tensor:
        if len(features) != len(self._order) or not features.is_floating_point():
            raise CriterionError(
                f"expected floating-point features of {len(self._order)} images, one for each label; got a tensor of "
                f"shape {tuple(features.shape)}, {features.dtype}"
            )
        return features.detach().reshape(len(features), -1)

    def _add(self, rows: Tensor) -> None:
        """Add what a centred piece contributes to the squared distances; ``rows`` are sorted by class."""
        parts = [rows[start:stop] for start, stop in zip(self._starts, self._starts[1:], strict=False)]
        norms = [_squared_norms(part) for part in parts]
        if not math.isfinite(sum(float(norm.sum()) for norm in norms)):
            raise CriterionError("the features hold NaN or infinity; check the network's weights")
        for a, b in self._pairs:
            total = self._squares.get((a, b))
            if total is None:
                total = rows.new_zeros(len(parts[a]), len(parts[b]), dtype=torch.float64)
                self._squares[a, b] = total
            if a == b:  # a class that lies far from the others must not lose digits to that
                centred = parts[a] - parts[a].mean(dim=0)
                _add_squares(total, centred, centred, *[_squared_norms(centred)] * 2, upper=True)
            else:
                _add_squares(total, parts[a], parts[b], norms[a], norms[b])

    def energy(
        self,
        *,
        exponent: float = 1.0,
        statistic: str = "v",
        standardize: bool = True,
        aggregate: str = "max",
    ) -> float:
        """Compute the score of :func:`layer_energy` from what was added."""
        _check_choice("statistic", statistic, Statistic)
        _check_choice("aggregate", aggregate, Aggregate)
        _check_exponent(exponent)
        self._require_features()
        reference = self.classes.index(self.reference)
        least = 1 if statistic == "v" else 2
        others = [place for place, count in enumerate(self.counts) if place != reference and count >= least]
        if not others or self.counts[reference] < least:
            raise CriterionError("the U-statistic needs two images of two classes; use statistic='v'")
        within = {
            place: self._mean_within(place, exponent, unbiased=statistic == "u")
            for place in (reference, *others)
        }
        found = [
            2 * self._mean_between(reference, other, exponent) - within[reference] - within[other]
            for other in others
        ]
        score = max(found) if aggregate == "max" else sum(found) / len(found)
        return score / self.elements ** (exponent / 2) if standardize else score

    def covariance(self, exponent: float = 1.0) -> float:
        """Compute :func:`distance_covariance_sqr`; needs ``pairs="all"``."""
        _check_exponent(exponent)
        self._require_features()
        row_means, product, _ = self._moments(exponent)
        apart = self._apart()
        return float(product + row_means.mean() * apart.mean() - 2 * (row_means * apart).mean())

    def correlation(self, exponent: float = 1.0) -> float:
        """Compute :func:`distance_correlation_sqr`; needs ``pairs="all"``."""
        covariance = self.covariance(exponent)
        row_means, _, square = self._moments(exponent)
        apart = self._apart()
        of_features = square + row_means.mean() ** 2 - 2 * row_means.square().mean()
        of_labels = (
            apart.mean() + apart.mean() ** 2 - 2 * apart.square().mean()
        )  # 0 and 1 are their own squares
        scale = math.sqrt(max(0.0, float(of_features) * float(of_labels)))
        return covariance / scale if scale else 0.0

    def _require_features(self) -> None:
        if not self.elements:
            raise CriterionError("no features were added; call update() first")

    def _distances(self, a: int, b: int, exponent: float) -> Tensor:
        """Distances to the power ``exponent``; of a class with itself those above the diagonal, zeros elsewhere."""
        powers = self._squares[a, b].clamp_min(0).pow(exponent / 2)
        return powers.triu(1) if a == b else powers

    def _mean_within(self, place: int, exponent: float, *, unbiased: bool) -> float:
        count = self.counts[place]
        total = 2 * float(self._distances(place, place, exponent).sum())
        return total / (count * (count - 1) if unbiased else count**2)

    def _mean_between(self, a: int, b: int, exponent: float) -> float:
        return float(self._distances(min(a, b), max(a, b), exponent).mean())

    def _moments(self, exponent: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of the matrix of all distances: means of its rows, mean with those within classes as 0, mean square."""
        n = len(self._order)
        device = next(iter(self._squares.values())).device
        rows = torch.zeros(n, dtype=torch.float64, device=device)
        between = torch.zeros((), dtype=torch.float64, device=device)
        square = torch.zeros_like(between)
        for a, b in self._pairs:
            distances = self._distances(a, b, exponent)
            rows[self._starts[a] : self._starts[a + 1]] += distances.sum(dim=1)
            rows[self._starts[b] : self._starts[b + 1]] += distances.sum(dim=0)
            square += 2 * distances.square().sum()
            between += 2 * distances.sum() if a != b else 0
        return rows / n, between / n**2, square / n**2

    def _apart(self) -> Tensor:
        """For each image, sorted by class, the share of images of other classes."""
        counts = torch.tensor(self.counts, dtype=torch.float64)
        apart = (1 - counts / len(self._order)).repeat_interleave(torch.tensor(self.counts))
        return apart.to(next(iter(self._squares.values())).device)


def _squared_norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()


def _add_squares(
    total: Tensor, a: Tensor, b: Tensor, norms_a: Tensor, norms_b: Tensor, *, upper: bool = False
) -> None:
    """Add ``||a_i||^2 + ||b_j||^2 - 2 a_i b_j`` to ``total``, a block of rows at a time."""
    for start in range(0, len(a), _ROWS):
        rows, first = slice(start, start + _ROWS), start if upper else 0
        block = (a[rows] @ b[first:].T).double().mul_(-2)
        total[rows, first:] += block.add_(norms_a[rows, None]).add_(norms_b[first:])


def _check_exponent(exponent: float) -> None:
    if not 0 < exponent < 2:
        raise CriterionError(f"exponent must lie between 0 and 2 (exclusive), got {exponent}")


def _check_choice(name: str, value: str, choices: object) -> None:
    known = get_args(choices)
    if value not in known:
        raise CriterionError(f"{name} {value!r} is unknown; expected {' or '.join(map(repr, known))}")
