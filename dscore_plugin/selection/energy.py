"""Choose residual branches by energy statistics: alike branches form clusters, and one of each stays.

Source: Soltani et al., *On the Energy Statistics of Feature Maps in Pruning of Neural Networks with
Skip-Connections*, arXiv 2201.11209.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dscore_plugin.costs import count
from dscore_plugin.criteria.energy import Aggregate, ClassDistances, Statistic
from dscore_plugin.datasets import ImageData, ImageSet
from dscore_plugin.errors import BudgetError, CriterionError, ModelError, did_you_mean
from dscore_plugin.groups import removal_count
from dscore_plugin.plan import LayerRemoval, LayerRow, Plan, fingerprint
from dscore_plugin.selection.budget import check_fraction
from dscore_plugin.selection.feature_maps import MEMORY_LIMIT, feature_map_sizes, feature_maps
from dscore_plugin.selection.journal import Journal
from dscore_plugin.selection.processes import Processes
from dscore_plugin.selection.selector import Request
from dscore_plugin.surgery.layers import Branch, find_branches, remove_branches
from dscore_plugin.training.progress import Progress

Choice = Literal["cluster", "rank", "random"]
Keep = Literal["first", "last"]
Labels = Literal["predicted", "ground_truth"]
Measure = Literal["energy", "covariance", "correlation"]


@dataclass(frozen=True)
class EnergySelector:
    """Remove residual branches whose feature maps say the same about the class as another branch's.

    Every branch is scored by the energy distances between its feature maps of different classes; the scores are
    clustered by exact k-means in one dimension, and one branch of each cluster stays, so that k branches stay. The
    network is not trained.

    Args:
        choice: ``"cluster"``, or a baseline: ``"rank"`` keeps the k highest scores, ``"random"`` any k (by seed; no
            image is looked at).
        keep: of each cluster, the branch ``"first"`` behind the input, or the ``"last"``.
        labels: ``"predicted"`` classes, as in the abstract, or the ``"ground_truth"``, as in the authors' code.
        measure: ``"energy"``, as the authors' code does, or squared distance ``"covariance"`` or ``"correlation"``,
            as the title may be read.
        standardize: divide the score by the square root of the number of elements of the map (not a correlation).
        statistic: ``"v"`` or ``"u"``, of energy distances.
        aggregate: ``"max"`` or ``"mean"`` of the energy distances to the reference class.
        exponent: of the distances, between 0 and 2 (exclusive).
        selection_images: of the training split, drawn anew each round, as many of each class; all if there are fewer.
        augmented: look at them with the training's augmentation, as the authors' code does.
        rounds: the score is the mean over so many draws (20 in the authors' code).
        memory_limit: bytes of feature maps held at a time; the peak lies about 0.5 GiB and one batch above it.
        batch_size: images at a time.

    Raises:
        CriterionError: if an option is unknown or out of range.
    """

    choice: str = "cluster"
    keep: str = "first"
    labels: str = "predicted"
    measure: str = "energy"
    standardize: bool = True
    statistic: str = "v"
    aggregate: str = "max"
    exponent: float = 1.0
    selection_images: int = 5184
    augmented: bool = False
    rounds: int = 1
    memory_limit: int = MEMORY_LIMIT
    batch_size: int = 128

    def __post_init__(self) -> None:
        choices = {"choice": Choice, "keep": Keep, "labels": Labels, "measure": Measure}
        choices |= {"statistic": Statistic, "aggregate": Aggregate}
        for name, known in choices.items():
            if getattr(self, name) not in get_args(known):
                hint = did_you_mean(str(getattr(self, name)), get_args(known))
                expected = " or ".join(map(repr, get_args(known)))
                raise CriterionError(f"{name} {getattr(self, name)!r} is unknown; expected {expected}{hint}")
        for name in ("selection_images", "rounds", "memory_limit", "batch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise CriterionError(f"{name} must be a whole number, 1 or more; got {getattr(self, name)!r}")
        if not 0 < self.exponent < 2:
            raise CriterionError(f"exponent must lie between 0 and 2 (exclusive), got {self.exponent}")

    def check(self, granularity: str) -> None:
        """Refuse another granularity than ``"layer"``; raise CriterionError."""
        if granularity != "layer":
            raise CriterionError(f"energy removes whole layers; got granularity {granularity!r}")

    def select(self, model: nn.Module, data: ImageData, request: Request) -> Plan:
        """Choose the branches that leave ``model``.

        Args:
            model: a network with residual branches; it is left as it was.
            data: the training images are looked at.
            request: granularity ``"layer"``; goal ``"keep_layers"`` (how many branches stay), ``"ratio"`` (the share
                of branches that leave), ``"target_macs"`` or ``"target_params"`` (met from below by the largest
                number of branches that meets it).

        Returns:
            The plan, with a row for each branch. ``made_by`` has the ``clusters``, one number for each row.

        Raises:
            CriterionError: if the granularity is another, or too few classes are seen.
            BudgetError: if the goal is out of range or cannot be reached.
            ModelError: if the network has fewer than two branches.
        """
        self.check(request.granularity)
        branches = _checked(model, request)
        scores = {} if self.choice == "random" else self.scores(model, data, request, branches)
        costs = _costs(model, request.example_inputs, [branch.name for branch in branches])
        order = [branch.name for branch in branches]
        if self.choice == "random":
            drawn = torch.randperm(len(order), generator=torch.Generator().manual_seed(request.seed))
            priority = [order[place] for place in drawn.tolist()]
        else:
            priority = sorted(order, key=lambda name: -scores[name])
        kept_of = {
            k: self._clustered(order, scores, k) if self.choice == "cluster" else set(priority[:k])
            for k in range(1, len(order) + 1)
        }
        kept = kept_of[_find_k(kept_of, costs, request)]
        return self._plan(model, order, scores, kept, costs, request)

    def scores(
        self, model: nn.Module, data: ImageData, request: Request, branches: Sequence[Branch]
    ) -> dict[str, float]:
        """Score each branch; several processes divide the branches among themselves and get the same scores.

        What a round has found is noted in the request's folder, and an interrupted run goes on from there.
        """
        processes = Processes()
        sizes = feature_map_sizes(model, request.example_inputs, [branch.output for branch in branches])
        journal, found = self._journal(model, request, processes)
        done = {(record["round"], record["branch"]): float(record["score"]) for record in found}
        mine = {branch.name for branch in processes.share(branches, lambda branch: sizes[branch.output])}
        for turn in range(self.rounds):
            left = [branch for branch in branches if branch.name in mine and (turn, branch.name) not in done]
            chosen = {branch.output: sizes[branch.output] for branch in left}
            names = {branch.output: branch.name for branch in left}
            images = self._images(data, request.seed, turn)
            for output, score in self._round(model, images, chosen, request.progress):
                done[turn, names[output]] = score
                if journal is not None:
                    journal.add({"round": turn, "branch": names[output], "score": score})
        own = [(turn, name, score) for (turn, name), score in done.items() if name in mine]
        every = {(turn, name): score for turn, name, score in processes.gather(own)}
        return {
            branch.name: sum(every[turn, branch.name] for turn in range(self.rounds)) / self.rounds
            for branch in branches
        }

    def _round(
        self, model: nn.Module, images: ImageSet, sizes: Mapping[str, int], progress: Progress
    ) -> Iterator[tuple[str, float]]:
        """Score the maps of one draw of images, module by module."""
        distances: ClassDistances | None = None
        labels: Tensor | None = None if self.labels == "predicted" else images.labels
        limits = {"memory_limit": self.memory_limit, "batch_size": self.batch_size}
        for part in feature_maps(model, images, sizes, progress=progress, **limits):
            labels = (
                part.predicted if labels is None else labels
            )  # of the first pass, lest a pass differ by a bit
            if distances is None:
                distances = ClassDistances(labels, pairs="reference" if self.measure == "energy" else "all")
            distances.update(part.values)
            if part.place.is_last:
                yield part.place.module, self._score(distances)
                distances.reset()
            del part  # lest it stay in memory while the next pass fills its own

    def _score(self, distances: ClassDistances) -> float:
        if self.measure == "correlation":
            return distances.correlation(self.exponent)
        if self.measure == "covariance":
            scale = distances.elements ** (self.exponent / 2) if self.standardize else 1
            return distances.covariance(self.exponent) / scale
        return distances.energy(
            exponent=self.exponent,
            statistic=self.statistic,
            standardize=self.standardize,
            aggregate=self.aggregate,
        )

    def _images(self, data: ImageData, seed: int, turn: int) -> ImageSet:
        source = data.train if self.augmented else data.train.plain()
        images = source.subset(min(self.selection_images, len(source)), seed=seed + turn)
        images.set_epoch(turn)
        return images

    def _journal(
        self, model: nn.Module, request: Request, processes: Processes
    ) -> tuple[Journal | None, list[dict[str, Any]]]:
        """Open the notes of this network and these options, and read what they hold."""
        if request.work is None:
            return None, []
        weights = fingerprint(model)
        identity = {**vars(self), "seed": request.seed, "fingerprint": weights}
        for key in ("choice", "keep", "memory_limit", "batch_size"):  # scores do not depend on them
            del identity[key]
        journal = Journal(request.work / f"energy-{weights[:16]}.jsonl")
        return journal, processes.once(lambda: journal.begin(identity, resume=True))

    def _clustered(self, order: Sequence[str], scores: Mapping[str, float], k: int) -> set[str]:
        """One branch of each of ``k`` clusters; where equal scores leave clusters empty, the next ones in order."""
        clusters = cluster([scores[name] for name in order], k)
        ranked = list(zip(order, clusters, strict=True))
        ranked = ranked if self.keep == "first" else ranked[::-1]
        firsts = {number: name for name, number in reversed(ranked)}
        kept = set(firsts.values())
        rest = [name for name, _ in ranked if name not in kept]
        return kept | set(rest[: k - len(kept)])

    def _plan(
        self,
        model: nn.Module,
        order: Sequence[str],
        scores: Mapping[str, float],
        kept: set[str],
        costs: _Costs,
        request: Request,
    ) -> Plan:
        leaving = [name for name in order if name not in kept]
        rows = [_row(name, scores.get(name), name in kept, costs.saved[name][0]) for name in order]
        macs, params = costs.left(leaving)
        made_by = {**vars(self), request.goal: request.amount, "seed": request.seed, "kept": len(kept)}
        if scores:
            made_by["clusters"] = cluster([scores[name] for name in order], len(kept))
        return Plan(
            fingerprint(model),
            tuple(request.example_inputs[0].shape[1:]),
            tuple(LayerRemoval(name) for name in leaving),
            tuple(rows),
            (costs.dense[0], macs),
            (costs.dense[1], params),
            made_by,
        )


def cluster(scores: Sequence[float], k: int) -> list[int]:
    """Divide numbers into ``k`` clusters with the least sum of squares: exact, by dynamic programming.

    Args:
        scores: the numbers.
        k: how many clusters; where there are fewer different numbers, some clusters stay empty.

    Returns:
        For each number its cluster; cluster numbers ascend with the scores.

    Raises:
        CriterionError: if kmeans1d is not installed.
    """
    try:
        import kmeans1d
    except ImportError as error:
        raise CriterionError(
            "clustering needs kmeans1d, which is not installed; run: pip install kmeans1d"
        ) from error
    found: list[int] = kmeans1d.cluster(list(scores), k).clusters
    return found


@dataclass(frozen=True)
class _Costs:
    """MACs and parameters of the whole network, and those that each branch takes with it."""

    dense: tuple[int, int]
    saved: Mapping[str, tuple[int, int]]

    def left(self, leaving: Sequence[str]) -> tuple[int, int]:
        macs, params = (
            total - sum(self.saved[name][place] for name in leaving) for place, total in enumerate(self.dense)
        )
        return macs, params


def _costs(model: nn.Module, example_inputs: tuple[Any, ...], names: Sequence[str]) -> _Costs:
    """Count what each branch saves, on a copy that loses one branch after the other."""
    shrinking = copy.deepcopy(model)
    counts = [count(shrinking, example_inputs)]
    for name in names:
        counts.append(count(remove_branches(shrinking, [name]), example_inputs))
    saved = {
        name: (before[0] - after[0], before[1] - after[1])
        for name, before, after in zip(names, counts, counts[1:], strict=False)
    }
    return _Costs(counts[0], saved)


def _checked(model: nn.Module, request: Request) -> tuple[Branch, ...]:
    branches = find_branches(model)
    if len(branches) < 2:
        raise ModelError(
            f"{type(model).__name__} has {len(branches)} residual branches of a known kind; expected two or more "
            "(dscore_plugin.surgery.layers.RULES lists the kinds)"
        )
    if request.goal != "keep_layers":
        if request.goal not in ("ratio", "target_macs", "target_params"):
            raise BudgetError(
                f"goal {request.goal!r} does not go with layers; give keep_layers, ratio or target_macs"
            )
        check_fraction(request.goal, request.amount)
    elif request.amount != int(request.amount) or not 1 <= request.amount <= len(branches):
        raise BudgetError(
            f"keep_layers must be a whole number from 1 to {len(branches)}, the branches of "
            f"{type(model).__name__}; got {request.amount:g}"
        )
    return branches


def _find_k(kept_of: Mapping[int, set[str]], costs: _Costs, request: Request) -> int:
    """Return how many branches stay."""
    names = list(costs.saved)
    if request.goal == "keep_layers":
        return int(request.amount)
    if request.goal == "ratio":
        return max(1, len(names) - removal_count(request.amount, len(names)))
    place = ("target_macs", "target_params").index(request.goal)
    lowest = 1.0
    for k in range(len(names), 0, -1):
        left = costs.left([name for name in names if name not in kept_of[k]])[place] / costs.dense[place]
        if left <= request.amount:
            return k
        lowest = min(lowest, left)
    raise BudgetError(
        f"{request.goal} {request.amount:g} cannot be reached by removing layers; the lowest is {lowest:.4f}"
    )


def _row(name: str, score: float | None, stays: bool, macs: int) -> LayerRow:
    return LayerRow(name, 1, score, score, None if stays else score, macs, LayerRemoval.type)
