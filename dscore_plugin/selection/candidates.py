"""Candidates: random masks over a whole network, and the search for the one that misclassifies least.

Source: Anwar and Sung, *Compact Deep Convolutional Neural Networks with Coarse Pruning*, arXiv 1610.09639, sec. 3.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dscore_plugin.criteria.coarse import TEMPERATURE, draw_leaving, misclassification_rate, places
from dscore_plugin.errors import BudgetError, ModelError
from dscore_plugin.groups import ChannelGroup
from dscore_plugin.masking import Masks
from dscore_plugin.plan import fingerprint
from dscore_plugin.selection.folding import fold_batchnorm as folded_copy
from dscore_plugin.selection.journal import Journal
from dscore_plugin.selection.measurement import first_images, placed
from dscore_plugin.selection.processes import Processes
from dscore_plugin.selection.replay import Recording, Replay
from dscore_plugin.training.evaluation import check_logits, require_images
from dscore_plugin.training.precision import set_memory_format
from dscore_plugin.training.progress import Advance, NoProgress, Progress

if TYPE_CHECKING:
    from dscore_plugin.datasets import ImageSet

AUTO_FIRST, AUTO_MOST = 25, 1600
RUNGS = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of the images; half of the candidates go on from each to the next
Known = dict[tuple[int, int, int], int]  # candidate, first image, last image + 1 -> right answers


@dataclass(frozen=True)
class Pool:
    """What a candidate takes its share of: the units of a group of channels, or a convolution's kernels.

    Attributes:
        name: of the group, or the convolution's qualified name.
        size: how many units or kernels there are.
        leaving: how many of them leave.
        group: the group; None stands for kernels.
        scores: what the candidates are drawn around, shape ``(size,)``; None draws uniformly.
        places: of kernels, their places in the convolution, ascending, shape ``(size,)``; None stands for all.
    """

    name: str
    size: int
    leaving: int
    group: ChannelGroup | None = None
    scores: Tensor | None = None
    places: Tensor | None = None


@dataclass(frozen=True, eq=False)
class NetworkMask:
    """One candidate: a mask over the whole network.

    Attributes:
        index: its number; with the seed it says all about the mask.
        removed: for each pool, by name, what leaves: ascending, int64.
    """

    index: int
    removed: Mapping[str, Tensor]


@dataclass(frozen=True)
class Search:
    """What a search has found.

    Attributes:
        winner: the candidate with the most right answers on all images; of equal ones, the lowest number.
        images: how many images there were.
        seen: for each candidate, on how many of them it was measured.
        correct: for each candidate, how many of these it classified rightly.
    """

    winner: NetworkMask
    images: int
    seen: tuple[int, ...]
    correct: tuple[int, ...]

    @property
    def evaluations(self) -> int:
        """How many images went through a candidate, over all candidates."""
        return sum(self.seen)

    @property
    def mcr(self) -> float:
        """The winner's misclassification rate, in percent."""
        return misclassification_rate(self.correct[self.winner.index], self.images)

    @property
    def best_so_far(self) -> tuple[float, ...]:
        """The lowest misclassification rate of the first 1, 2, 3, ... candidates, in percent.

        A candidate that racing stopped counts as no better than those before it; 100 stands where all were stopped.
        """
        rates = (
            misclassification_rate(correct, self.images) if seen == self.images else 100.0
            for seen, correct in zip(self.seen, self.correct, strict=True)
        )
        return tuple(accumulate(rates, min))

    def best_of(self, count: int) -> int:
        """Return the number of the best among the first ``count`` candidates that saw all images."""
        return _best(self.images, self.seen[:count], self.correct[:count])


@dataclass(frozen=True)
class Options:
    """How candidates are compared.

    Attributes:
        candidates: how many, or ``"auto"``, see :func:`search`.
        seed: of the candidates and of the order of the images.
        temperature: see :func:`sample_candidate`.
        racing: stop what looks hopeless, see :func:`search`.
        batch_size: images at a time.
        fold_batchnorm: fold batch norms into the convolutions before them; outputs then differ by rounding. A
            network that cannot be folded is measured as it is.
        memory_limit: bytes for images and the outputs that are reused, for each process; what does not fit is
            loaded and computed again.
    """

    candidates: int | Literal["auto"] = 100
    seed: int = 0
    temperature: float = TEMPERATURE
    racing: bool = False
    batch_size: int = 64
    fold_batchnorm: bool = True
    memory_limit: int = 2 * 2**30

    def check(self) -> None:
        """Raise BudgetError if a value is out of range."""
        number = self.candidates
        if number != "auto" and not (
            isinstance(number, int) and not isinstance(number, bool) and number >= 1
        ):
            raise BudgetError(f"candidates must be a number of at least 1, or 'auto'; got {number!r}")
        if self.batch_size < 1 or self.memory_limit < 1 or not self.temperature > 0:
            raise BudgetError(
                "batch_size and memory_limit must be at least 1 and temperature above 0; got "
                f"{self.batch_size}, {self.memory_limit} and {self.temperature:g}"
            )
        if not 0 <= self.seed < 2**63:
            raise BudgetError(f"seed must be 0 or a positive 63-bit number, got {self.seed}")


def sample_candidate(
    pools: Sequence[Pool], seed: int, index: int, temperature: float = TEMPERATURE
) -> NetworkMask:
    """Draw candidate ``index`` of a seed: the same mask wherever and whenever it is asked for.

    Args:
        pools: what leaves, in a fixed order.
        seed: of the search, 0 to 2**63 - 1.
        index: the candidate's number, from 0. Number 0 is, where there are scores, what the scores themselves remove.
        temperature: how far candidates stray from the scores, see :func:`~dscore_plugin.criteria.coarse.draw_leaving`.

    Returns:
        The candidate: each pool's part is drawn independently of the others, uniformly over all subsets where the
        pool has no scores.

    Source: arXiv 1610.09639, sec. 3: "random paths through the network"; scores are ours.
    """
    stream = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))
    removed = {}
    for pool in pools:
        bits = stream.random_raw(pool.size) >> np.uint64(12)  # raw bits: no release of numpy changes them
        uniform = torch.from_numpy((bits + 0.5) * 2.0**-52)
        if pool.scores is not None and index == 0:
            drawn = places(pool.scores).argsort()[: pool.leaving].sort().values
        else:
            drawn = draw_leaving(uniform, pool.leaving, pool.scores, temperature)
        removed[pool.name] = drawn if pool.places is None else pool.places[drawn]
    return NetworkMask(index, removed)


def search(
    model: nn.Module,
    pools: Sequence[Pool],
    images: ImageSet,
    options: Options | None = None,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Search:
    """Draw candidates and find the one that classifies most images rightly, without retraining.

    The number of candidates is given, or found by doubling: after 25, 50, 100, ... candidates the search ends if the
    last doubling has not raised the best accuracy ``p`` by more than one standard error of such a measurement,
    ``sqrt(p (1 - p) / images)``; at 1,600 it ends anyway. (The paper calls 100 enough up to 40 %, and gives no rule.)

    Without racing every candidate sees every image, and the winner is the paper's choice: the lowest
    misclassification rate of all candidates drawn. With racing (successive halving) all see an eighth of the images,
    the better half goes on to a quarter, the better half of these to a half, and the better half of these to all:
    at least 3 times fewer image evaluations from 8 candidates on, as far as the halves come out even. The winner
    then is the best of those that came through; only they have been measured on all images. Both measure the same
    pieces of the images in the same batches, so that a candidate's count is the same in both.

    Under ``accelerate launch`` or ``torchrun`` the processes divide the candidates among themselves, and all return
    the same.

    Args:
        model: a classifier, on the device to compute on; it is not touched. What counts are float32 and eval mode.
        pools: what leaves; those that lose nothing are left out.
        images: held out of training, and not the test set; used without augmentation.
        options: see there.
        checkpoint: a file that takes what is measured.
        resume: go on with that file, if it is there. It serves other numbers of candidates, and racing, too.
        progress: shows a bar.

    Returns:
        The winner, and every candidate's count.

    Raises:
        BudgetError: if an option is out of range, or no pool loses anything or one loses everything.
        DataError: if there are no images.
        ModelError: if the model gives no logits.
        ArtifactError: if the checkpoint belongs to another search, or exists without ``resume``.

    Source: arXiv 1610.09639, sec. 3.
    """
    options = options or Options()
    options.check()
    pools = _checked(pools)
    require_images(images)
    processes = Processes()
    race = _Race(model, pools, images, options, processes)
    race.open(checkpoint, resume)
    shown = progress if progress and processes.index == 0 else NoProgress()
    most = AUTO_MOST if options.candidates == "auto" else options.candidates
    with shown.task("candidates", race.images * most) as advance:
        for start, stop in _stages(options):
            race.run(range(start, stop), advance)
            if options.candidates == "auto" and not _improves(race.result().best_so_far, start, race.images):
                break
    return race.result()


def _stages(options: Options) -> Iterator[tuple[int, int]]:
    """Give the first candidate and the last + 1 of each stage."""
    if options.candidates != "auto":
        yield 0, options.candidates
        return
    start, stop = 0, AUTO_FIRST
    while start < AUTO_MOST:
        yield start, stop
        start, stop = stop, 2 * stop


def _improves(best_so_far: Sequence[float], before: int, images: int) -> bool:
    """Whether the candidates from ``before`` on have lowered the rate by more than a standard error."""
    if before == 0:
        return True
    best = best_so_far[-1] / 100
    return best_so_far[before - 1] / 100 - best > math.sqrt(best * (1 - best) / images)


def _best(images: int, seen: Sequence[int], correct: Sequence[int]) -> int:
    complete = [index for index, number in enumerate(seen) if number == images]
    return max(complete, key=lambda index: (correct[index], -index))


def _checked(pools: Sequence[Pool]) -> list[Pool]:
    if not any(pool.leaving for pool in pools):
        raise BudgetError("nothing would leave: the ratio is too small for these layers; raise it")
    for pool in pools:
        if not 0 <= pool.leaving < pool.size:
            raise BudgetError(
                f"{pool.leaving} of {pool.size} cannot leave {pool.name!r}; at least one must stay: lower the ratio"
            )
    return [pool for pool in pools if pool.leaving]


class _Race:
    """Measures candidates, on more and more of the images.

    Args:
        model: left as it is.
        pools: what leaves.
        images: all of them.
        options: how to measure.
        processes: that share the work.
    """

    def __init__(
        self,
        model: nn.Module,
        pools: Sequence[Pool],
        images: ImageSet,
        options: Options,
        processes: Processes,
    ) -> None:
        self.images = len(images)
        self._pools, self._options, self._processes = pools, options, processes
        self._bench = _Bench(_prepared(model, images, options), pools, images.plain(), options)
        self._identity = _identity(model, pools, images.plain(), options)
        self._journal: Journal | None = None
        self._known: Known = {}
        self._seen: dict[int, int] = {}
        self._correct: dict[int, int] = {}

    def open(self, checkpoint: Path | None, resume: bool) -> None:
        """Read what was measured before."""
        if checkpoint is None:
            return
        journal = Journal(checkpoint)
        records = self._processes.once(lambda: journal.begin(self._identity, resume))
        self._known = {(r["candidate"], *r["images"]): r["correct"] for r in records}
        self._journal = journal

    def run(self, indices: Sequence[int], advance: Advance) -> None:
        """Measure candidates: all of them on all images, or half of them from each rung to the next."""
        left = list(indices)
        self._seen |= dict.fromkeys(left, 0)
        self._correct |= dict.fromkeys(left, 0)
        for start, stop in self._rungs():
            mine = self._processes.share(left, lambda _: 1.0)
            measured = self._measure(mine, start, stop, lambda steps: advance(steps * self._processes.number))
            for index, correct in self._processes.gather(sorted(measured.items())):
                self._seen[index] = stop
                self._correct[index] += correct
            if self._options.racing and stop < self.images:
                stopped = self._worse_half(left)
                advance((self.images - stop) * len(stopped))
                left = [index for index in left if index not in stopped]

    def _rungs(self) -> list[tuple[int, int]]:
        ends = sorted({math.ceil(share * self.images) for share in RUNGS})
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def _worse_half(self, left: Sequence[int]) -> set[int]:
        ranked = sorted(left, key=lambda index: (-self._correct[index], index))
        return set(ranked[-(-len(ranked) // 2) :])

    def _measure(
        self, mine: Sequence[int], start: int, stop: int, advance: Callable[[int], None]
    ) -> dict[int, int]:
        total = dict.fromkeys(sorted(mine), 0)
        for first, last in self._bench.pieces(start, stop):
            for index in total:
                total[index] += self._count(index, first, last)
                advance(last - first)
        return total

    def _count(self, index: int, first: int, last: int) -> int:
        key = (index, first, last)
        if key not in self._known:
            self._known[key] = self._bench.correct(self._sample(index), first, last)
            if self._journal:
                self._journal.add({"candidate": index, "images": [first, last], "correct": self._known[key]})
        return self._known[key]

    def _sample(self, index: int) -> NetworkMask:
        return sample_candidate(self._pools, self._options.seed, index, self._options.temperature)

    def result(self) -> Search:
        """Return what was found so far."""
        seen, correct = tuple(self._seen.values()), tuple(self._correct.values())
        return Search(self._sample(_best(self.images, seen, correct)), self.images, seen, correct)


@dataclass(frozen=True)
class _Piece:
    """Images in memory, with the outputs of the network's part that no candidate changes."""

    batches: list[tuple[Tensor, Tensor]]
    recordings: Sequence[Recording | None]


class _Bench:
    """Runs candidates on pieces of the images, which are taken in an order that the seed shuffles.

    Args:
        model: a copy to work on, in eval mode, float32.
        pools: what leaves.
        images: the set.
        options: seed, batch size and memory.
    """

    def __init__(self, model: nn.Module, pools: Sequence[Pool], images: ImageSet, options: Options) -> None:
        self._model, self._pools, self._images = model, pools, images
        self._order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))
        self._batch_size = options.batch_size
        self._masks = Masks(model)
        self._like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        example = first_images(images, 2)[0].to(self._like)
        self._replay = Replay(model, example)
        with self._masked(sample_candidate(pools, options.seed, 0)) as changed:  # the same for all candidates
            self._prefix = self._replay.prefix(changed)
        room = options.memory_limit // (example[0].nbytes + self._prefix.bytes_per_image)
        self._at_once = max(options.batch_size, room // options.batch_size * options.batch_size)
        self._loaded: dict[tuple[int, int], _Piece] = {}

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Divide images into pieces that fit into memory: the first image of each, and the last + 1."""
        for first in range(start, stop, self._at_once):
            yield first, min(first + self._at_once, stop)

    def correct(self, candidate: NetworkMask, first: int, last: int) -> int:
        """Count the images of a piece that the network classifies rightly under a candidate's mask."""
        piece = self._load(first, last)
        with self._masked(candidate), self._exact():
            return sum(map(self._right, piece.batches, piece.recordings))

    @contextmanager
    def _masked(self, candidate: NetworkMask) -> Iterator[tuple[nn.Module, ...]]:
        """Silence what the candidate removes; give the modules that work otherwise."""
        parts = [(pool, candidate.removed[pool.name]) for pool in self._pools]
        channels = [(pool.group, removed.tolist()) for pool, removed in parts if pool.group is not None]
        kernels = {pool.name: removed for pool, removed in parts if pool.group is None}
        with self._masks:
            self._masks.silence(channels, kernels)
            yield self._masks.changed

    @contextmanager
    def _exact(self) -> Iterator[None]:
        with torch.inference_mode(), torch.autocast(self._like.device.type, enabled=False):
            yield

    def _right(self, batch: tuple[Tensor, Tensor], recording: Recording | None) -> int:
        inputs, labels = batch
        logits = check_logits(self._replay.run(inputs, recording), labels)
        return int((logits.argmax(dim=1) == labels).sum())

    def _load(self, first: int, last: int) -> _Piece:
        if (first, last) not in self._loaded:
            if sum(stop - start for start, stop in self._loaded) + last - first > self._at_once:
                self._loaded.clear()
            batches = [
                placed(self._images.__getitems__(part.tolist()), self._like)
                for part in self._order[first:last].split(self._batch_size)
            ]
            self._loaded[first, last] = _Piece(batches, self._recorded(batches))
        return self._loaded[first, last]

    def _recorded(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Recording | None]:
        """Compute once what no mask changes; None for each batch where replaying it gives other outputs."""
        with self._exact():
            recordings = [self._replay.record(self._prefix, inputs) for inputs, _ in batches]
            agrees = self._replay.agrees(batches[0][0], recordings[0], self._replay.run(batches[0][0]))
        return recordings if agrees else [None] * len(batches)


def _prepared(model: nn.Module, images: ImageSet, options: Options) -> nn.Module:
    """Copy the network into the form that is fastest to evaluate."""
    copied = copy.deepcopy(model).float().eval()
    if options.fold_batchnorm:
        like = next((p for p in copied.parameters() if p.is_floating_point()), torch.empty(0))
        with suppress(ModelError):  # one that cannot be folded is slower, and gives no other result
            copied = folded_copy(copied, first_images(images, 2)[0].to(like))
    set_memory_format(copied, torch.channels_last)
    return copied


def _identity(model: nn.Module, pools: Sequence[Pool], images: ImageSet, options: Options) -> dict[str, Any]:
    """Say what is measured, as plain JSON values."""
    inputs, labels = first_images(images, 64)
    pixels = hashlib.sha256(inputs.contiguous().numpy().tobytes() + labels.numpy().tobytes())
    drawn = hashlib.sha256()
    for pool in pools:
        parts = [None if part is None else part.tolist() for part in (pool.scores, pool.places)]
        drawn.update(repr((pool.name, pool.size, pool.leaving, pool.group is None, *parts)).encode())
    return {
        "model": fingerprint(model),
        "pools": drawn.hexdigest(),
        "images": [len(images), pixels.hexdigest()],
        "seed": options.seed,
        "temperature": options.temperature,
        "batch_size": options.batch_size,
        "fold_batchnorm": options.fold_batchnorm,
    }
