"""Layer sensitivity: the accuracy of a network with each group pruned alone, and the ratios that follow from it.

Source: Park et al., *D-Score: A Synapse-Inspired Approach for Filter Pruning*, arXiv 2308.04470, sec. 3.2 and 3.3.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from dscore_plugin.errors import ArtifactError, BudgetError, ModelError, PlanError
from dscore_plugin.files import read_json, write_json, write_text
from dscore_plugin.groups import ScoredGroup, removal_count
from dscore_plugin.plan import fingerprint
from dscore_plugin.selection.allocation import Counts, Limits
from dscore_plugin.selection.folding import fold_batchnorm as folded_copy
from dscore_plugin.selection.journal import Journal
from dscore_plugin.selection.measurement import Correct, Measurement, first_images
from dscore_plugin.selection.processes import Processes
from dscore_plugin.training.evaluation import require_images
from dscore_plugin.training.precision import set_memory_format
from dscore_plugin.training.progress import NoProgress, Progress

if TYPE_CHECKING:
    from dscore_plugin.datasets import ImageSet

Protocol = Literal["validation", "test"]
RATIOS = tuple(step / 20 for step in range(1, 20))
FORMAT_VERSION = 1
_EQUAL = 1e-9  # percent: a difference of accuracies smaller than that is rounding


@dataclass(frozen=True)
class Sensitivity:
    """How accurate a network is with one group pruned alone, without retraining.

    Attributes:
        dense_top1: percent, of the whole network on the same images.
        images: how many were looked at.
        ratios: tested, ascending.
        layers: for each group, by name, top-1 in percent for each ratio, written as ``"0.05"``; None where a cell
            was left out because the group had fallen below the floor at a smaller ratio.
        orders: for each group its units in the order in which they leave. What was measured at ratio ``r`` is a
            network without the first ``floor(r n + 1e-9)`` of these.
        criterion: what ordered them.
        protocol: which images: ``"validation"``, or ``"test"`` as in the paper, which leaks them into the choice.
        fingerprint: of the network, see :func:`dscore_plugin.plan.fingerprint`.
        early_exit: points below ``dense_top1`` at which groups were given up; None if every cell was measured.
        fold_batchnorm: whether batch norms were folded for the measurement.
    """

    dense_top1: float
    images: int
    ratios: tuple[float, ...]
    layers: Mapping[str, Mapping[str, float | None]]
    orders: Mapping[str, tuple[int, ...]] = field(repr=False)
    criterion: str = ""
    protocol: Protocol = "validation"
    fingerprint: str = ""
    early_exit: float | None = None
    fold_batchnorm: bool = False

    @property
    def floor(self) -> float:
        """The lowest threshold, in percent, for which the table holds everything that the rule needs."""
        return 0.0 if self.early_exit is None else max(0.0, self.dense_top1 - self.early_exit)

    def curve(self, layer: str) -> tuple[float | None, ...]:
        """Return the accuracies of one group, in percent, in the order of ``ratios``."""
        return tuple(self.layers[layer][ratio_key(ratio)] for ratio in self.ratios)

    def ratios_at(self, threshold: float) -> dict[str, float]:
        """Apply the paper's rule: for each group the ratio before the first one that falls below a threshold.

        Args:
            threshold: top-1 in percent, the same for all groups; "below" means less than it.

        Returns:
            For each group the ratio to remove: the largest tested one if none falls below, 0 if the first does.

        Raises:
            BudgetError: if the threshold lies above the dense accuracy, below 0, or below the floor of an early
                exit.
        """
        if not 0 <= threshold <= self.dense_top1 + _EQUAL:
            raise BudgetError(
                f"threshold {threshold:g} % must lie between 0 and the dense accuracy on these images, "
                f"{self.dense_top1:.2f} %"
            )
        if threshold < self.floor - _EQUAL:
            raise BudgetError(
                f"threshold {threshold:g} % lies below {self.floor:.2f} %, where the early exit gave layers up; "
                f"choose a higher one, or measure with early_exit={self.dense_top1 - threshold:.3g} or without"
            )
        return {layer: self._ratio_at(layer, threshold) for layer in self.layers}

    def _ratio_at(self, layer: str, threshold: float) -> float:
        before = 0.0
        for ratio, top1 in zip(self.ratios, self.curve(layer), strict=True):
            if top1 is None or top1 < threshold - _EQUAL:
                return before
            before = ratio
        return before

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Write ``sensitivity.json`` and ``sensitivity.csv``, one line for each group.

        Raises:
            ArtifactError: if they cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"cannot write {folder}: {error.strerror}") from error
        table, sheet = folder / "sensitivity.json", folder / "sensitivity.csv"
        write_json(table, self.to_dict())
        write_text(sheet, self._csv())
        return table, sheet

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["layer", "units", *map(ratio_key, self.ratios)])
        for layer in self.layers:
            cells = ["" if top1 is None else f"{top1:.4f}" for top1 in self.curve(layer)]
            writer.writerow([layer, len(self.orders[layer]), *cells])
        return text.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain JSON values."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @staticmethod
    def load(path: str | Path) -> Sensitivity:
        """Read ``sensitivity.json``; raise ArtifactError if it is missing or damaged."""
        return Sensitivity.from_dict(read_json(path))

    @staticmethod
    def from_dict(content: Any) -> Sensitivity:
        """Build the table from plain JSON values; raise ArtifactError if they are none."""
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"expected a sensitivity table of format version {FORMAT_VERSION}, got {version!r}; make one "
                "with: dscore sensitivity"
            )
        try:
            table = Sensitivity(
                dense_top1=float(content["dense_top1"]),
                images=int(content["images"]),
                ratios=check_ratios(content["ratios"]),
                layers={str(name): dict(cells) for name, cells in content["layers"].items()},
                orders={str(name): tuple(map(int, order)) for name, order in content["orders"].items()},
                criterion=str(content["criterion"]),
                protocol=content["protocol"],
                fingerprint=str(content["fingerprint"]),
                early_exit=None if content["early_exit"] is None else float(content["early_exit"]),
                fold_batchnorm=bool(content["fold_batchnorm"]),
            )
            _check_table(table)
        except (KeyError, TypeError, ValueError, AttributeError, BudgetError) as error:
            raise ArtifactError(
                f"the sensitivity table is damaged: {type(error).__name__}: {error}; make a new one"
            ) from error
        return table

    def require_for(self, scored: Sequence[ScoredGroup]) -> None:
        """Make sure that the table was measured with the groups and the orders of ``scored``.

        Raises:
            PlanError: if a group is missing, or its units would leave in another order.
        """
        for item in scored:
            order = self.orders.get(item.group.name)
            if order is None:
                raise PlanError(f"the sensitivity table has no layer {item.group.name!r}; measure it again")
            if order != item.order:
                raise PlanError(
                    f"the sensitivity of {item.group.name!r} was measured with other scores (criterion "
                    f"{self.criterion!r}); measure it again"
                )


def _check_table(table: Sensitivity) -> None:
    if table.layers.keys() != table.orders.keys():
        raise ValueError("layers and orders name different layers")
    for layer, order in table.orders.items():
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"the order of {layer!r} does not name each of its units once")
        numbers = [top1 for top1 in table.curve(layer) if top1 is not None]
        if any(isinstance(top1, bool) or not 0 <= top1 <= 100 for top1 in numbers):
            raise ValueError(f"an accuracy of {layer!r} is no percentage")
    if table.protocol not in get_args(Protocol):
        raise ValueError(f"protocol {table.protocol!r}")


def ratio_key(ratio: float) -> str:
    """Write a ratio as a key of the table: with two decimals, or as many as it takes."""
    short = f"{ratio:.2f}"
    return short if abs(float(short) - ratio) < 1e-9 else f"{ratio:.10g}"


def check_ratios(ratios: Sequence[float]) -> tuple[float, ...]:
    """Return ratios in ascending order, each once; raise BudgetError if there are none or one is not in (0, 1)."""
    ascending = tuple(sorted({float(ratio) for ratio in ratios}))
    if not ascending or not 0 < ascending[0] <= ascending[-1] < 1:
        raise BudgetError(f"ratios must lie between 0 and 1 (exclusive), got {list(ratios)}")
    return ascending


class SensitivityPath:
    """The allocations of the threshold rule, from above the highest accuracy measured down to the table's floor.

    Args:
        sensitivity: the table.
        scored: the groups, with the scores that the table was measured with.
        limits: what no allocation may do.

    Raises:
        PlanError: if the table was measured with other groups or scores.
    """

    def __init__(self, sensitivity: Sensitivity, scored: Sequence[ScoredGroup], limits: Limits) -> None:
        sensitivity.require_for(scored)
        self._sensitivity = sensitivity
        self._units = {item.group.name: item.group.units for item in scored}
        self._limits = limits
        highest = max(
            (x for name in self._units for x in sensitivity.curve(name) if x is not None), default=0
        )
        self._top = max(highest, sensitivity.dense_top1) + 1e-6

    def threshold(self, t: float) -> float:
        """Return the threshold, in percent, that ``t`` in ``[0, 1]`` stands for; it falls linearly."""
        return self._top + t * (self._sensitivity.floor - self._top)

    def at(self, t: float) -> Counts:
        """Return the units that leave each group at the threshold that ``t`` stands for."""
        return self.counts(self.threshold(t))

    def counts(self, threshold: float) -> Counts:
        """Return the units that leave each group at a threshold in percent."""
        return {
            name: self._limits.clamp(name, removal_count(self._sensitivity._ratio_at(name, threshold), units))
            for name, units in self._units.items()
        }


def sensitivity_analysis(
    model: nn.Module,
    scored: Sequence[ScoredGroup],
    images: ImageSet,
    *,
    ratios: Sequence[float] = RATIOS,
    batch_size: int = 128,
    early_exit: float | None = None,
    fold_batchnorm: bool = False,
    criterion: str = "",
    protocol: Protocol = "validation",
    checkpoint: Path | None = None,
    resume: bool = False,
    memory_limit: int = 2 * 2**30,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measure the accuracy with each group pruned alone, at several ratios, without retraining.

    Channels are silenced by masks on one copy of the network, in eval mode and float32; ``model`` is not touched.
    What the masks leave alone is computed once for each group, and a ratio that silences as many units as another
    is not measured again. Under ``accelerate launch`` or ``torchrun`` the processes divide the groups among
    themselves, and all return the same table.

    Args:
        model: a classifier, on the device to compute on.
        scored: the groups and their scores; for the paper's cumulative re-ranking, from :func:`reranked`.
        images: held out of training and not the test set, unless ``protocol`` says so; used without augmentation.
        ratios: shares of each group's units to silence: the first ``floor(r n + 1e-9)`` in the group's order.
        batch_size: images at a time.
        early_exit: give a group up at the first ratio with which it falls more than so many points below the dense
            accuracy: larger ratios are left out. The threshold rule stops there anyway, so that it gives the same
            ratios for every threshold down to that floor.
        fold_batchnorm: fold batch norms into the convolutions before them, for speed. Outputs then differ by
            rounding.
        criterion: what scored the groups, for the record.
        protocol: where the images come from, for the record.
        checkpoint: a file that takes what is measured, group by group.
        resume: go on with that file, if it is there.
        memory_limit: bytes for images and the outputs that are reused, for each process. Where they do not fit,
            the images are taken in several parts; where not even one batch fits, everything is computed again.
        progress: shows a bar.

    Returns:
        The table; the groups stand in the order of ``scored``.

    Raises:
        BudgetError: if a ratio, ``batch_size``, ``memory_limit`` or ``early_exit`` is out of range.
        DataError: if there are no images.
        ModelError: if there are no groups, the model gives no logits, or batch norms cannot be folded.
        ArtifactError: if the checkpoint belongs to another measurement, or exists without ``resume``.
    """
    require_images(images)
    ratios = check_ratios(ratios)
    _check_options(scored, batch_size, memory_limit, early_exit)
    processes = Processes()
    images = images.plain()
    table = Sensitivity(
        dense_top1=0.0,
        images=len(images),
        ratios=ratios,
        layers={},
        orders={item.group.name: item.order for item in scored},
        criterion=criterion,
        protocol=protocol,
        fingerprint=fingerprint(model),
        early_exit=early_exit,
        fold_batchnorm=fold_batchnorm,
    )
    journal = Journal(checkpoint) if checkpoint else None
    known = _known(processes, journal, _identity(table, images), resume)

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.autocast(device.type, enabled=False):
        measurement = _prepare(model, images, batch_size, memory_limit, fold_batchnorm)
        curves = [
            measurement.curve(item, [removal_count(r, item.group.units) for r in ratios]) for item in scored
        ]
        dense = measurement.dense()
        table = replace(table, dense_top1=100 * dense / len(images))
        mine = processes.share(curves, lambda curve: curve.cost)
        shown = progress if progress and processes.index == 0 else NoProgress()
        with shown.task(
            "sensitivity", sum(len(c.counts) for c in mine) * -(-len(images) // batch_size)
        ) as bar:
            measurement.run(mine, known, _recording(journal), _hopeless(table), bar)
    correct = dict(processes.gather([(curve.name, {0: dense, **curve.correct}) for curve in mine]))
    layers = {item.group.name: _cells(item, ratios, correct[item.group.name], len(images)) for item in scored}
    return replace(table, layers=layers)


def reranked(
    scored: Sequence[ScoredGroup],
    ratios: Sequence[float],
    rescore: Callable[[ScoredGroup, Tensor], Tensor],
) -> list[ScoredGroup]:
    """Order the units as the paper's code does: step by step, each time scoring anew what is left of the layer.

    Args:
        scored: the groups.
        ratios: the steps; at each one the units left are scored, and the lowest leave until ``floor(r n + 1e-9)``
            are gone.
        rescore: takes a group and the units left in it, ascending, shape ``(m,)``, and returns their scores,
            ``(m,)``; not asked where a single one is left.

    Returns:
        The groups with the place in the order, from 0 to 1, for a score.

    Raises:
        BudgetError: if a ratio is out of range.
    """
    steps = check_ratios(ratios)
    return [replace(item, scores=_places(item, steps, rescore)) for item in scored]


def _places(
    item: ScoredGroup, ratios: Sequence[float], rescore: Callable[[ScoredGroup, Tensor], Tensor]
) -> Tensor:
    units = item.group.units
    left, gone = torch.arange(units), torch.empty(0, dtype=torch.int64)
    for total in [*(removal_count(ratio, units) for ratio in ratios), units]:
        if total > len(gone):
            scores = rescore(item, left) if len(left) > 1 else torch.zeros(1)
            order = torch.argsort(scores, stable=True)
            more = total - len(gone)
            gone = torch.cat([gone, left[order[:more]]])
            left = left[order[more:]].sort().values
    places = torch.empty(units, dtype=torch.float64)
    places[gone] = torch.arange(units, dtype=torch.float64) / max(1, units - 1)
    return places


def _check_options(
    scored: Sequence[ScoredGroup], batch_size: int, memory_limit: int, early_exit: float | None
) -> None:
    if not scored:
        raise ModelError("there are no groups of channels to measure; check which layers can be pruned")
    if batch_size < 1 or memory_limit < 1:
        raise BudgetError(
            f"batch_size and memory_limit must be at least 1, got {batch_size} and {memory_limit}"
        )
    if early_exit is not None and not 0 < early_exit <= 100:
        raise BudgetError(f"early_exit must lie above 0 and at most at 100 points, got {early_exit:g}")


def _prepare(
    model: nn.Module, images: ImageSet, batch_size: int, memory_limit: int, fold_batchnorm: bool
) -> Measurement:
    """Copy the network into the form that is fastest to evaluate."""
    copied = copy.deepcopy(model).float().eval()
    if fold_batchnorm:
        copied = folded_copy(copied, first_images(images, 2)[0].to(next(copied.parameters())))
    set_memory_format(copied, torch.channels_last)
    return Measurement(copied, images, batch_size, memory_limit)


def _identity(table: Sensitivity, images: ImageSet) -> dict[str, Any]:
    """Say what is measured, as plain JSON values."""
    orders = hashlib.sha256(repr(sorted(table.orders.items())).encode()).hexdigest()
    inputs, labels = first_images(images, 64)
    pixels = hashlib.sha256(inputs.contiguous().numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    return {
        "model": table.fingerprint,
        "criterion": table.criterion,
        "scores": orders,
        "images": [len(images), pixels],
        "protocol": table.protocol,
        "ratios": list(table.ratios),
        "early_exit": table.early_exit,
        "fold_batchnorm": table.fold_batchnorm,
    }


def _hopeless(table: Sensitivity) -> Callable[[int, int], bool]:
    """Give the rule of the early exit: even if all images left were right, the accuracy would be below the floor."""
    if table.early_exit is None:
        return lambda correct, left: False
    return lambda correct, left: 100 * (correct + left) / table.images < table.floor - _EQUAL


def _known(
    processes: Processes, journal: Journal | None, identity: Mapping[str, Any], resume: bool
) -> dict[tuple[str, int, int], Correct]:
    """Open the journal, in one process for all, and read what was measured before."""
    if journal is None:
        return {}
    return {
        (record["layer"], *record["images"]): {int(count): n for count, n in record["correct"].items()}
        for record in processes.once(lambda: journal.begin(identity, resume))
    }


def _recording(journal: Journal | None) -> Callable[[str, int, int, Correct], None]:
    def record(layer: str, start: int, stop: int, correct: Correct) -> None:
        if journal:
            journal.add({"layer": layer, "images": [start, stop], "correct": correct})

    return record


def _cells(
    item: ScoredGroup, ratios: Sequence[float], correct: Correct, images: int
) -> dict[str, float | None]:
    counts = [removal_count(ratio, item.group.units) for ratio in ratios]
    return {
        ratio_key(ratio): 100 * correct[count] / images if count in correct else None
        for ratio, count in zip(ratios, counts, strict=True)
    }
