"""From a model to a Plan, and from a Plan to a smaller model: the two calls most users need."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from dscore_plugin.arguments import as_arguments
from dscore_plugin.errors import BudgetError, CriterionError, DScoreError, ModelError, PlanError
from dscore_plugin.files import read_json, write_json
from dscore_plugin.groups import ChannelGroup, ScoredGroup
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph, producers
from dscore_plugin.integrations.torch_pruning.removal import remove_channels
from dscore_plugin.loading import load_object
from dscore_plugin.modes import in_eval_mode, modes_kept
from dscore_plugin.plan import ChannelRemoval, LayerRow, Plan, fingerprint
from dscore_plugin.registry import CriterionInfo, get_criterion
from dscore_plugin.report.numbers import call_latency
from dscore_plugin.selection.allocation import Counts, GlobalPath, Limits, Path, UniformPath, total
from dscore_plugin.selection.budget import Measure, check_fraction, meet, meet_latency
from dscore_plugin.selection.selector import Request
from dscore_plugin.selection.sensitivity import Sensitivity, SensitivityPath, reranked
from dscore_plugin.training.progress import NoProgress, Progress

GOALS = ("target_macs", "target_params", "target_latency", "threshold", "max_drop")
ALLOCATIONS = ("uniform", "global", "sensitivity")
LAYERS = ("all", "inner")
Batches = Sequence[tuple[Tensor, Tensor]]


def prune(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    criterion: str = "d_score",
    ratio: float | None = None,
    **options: Any,
) -> nn.Module:
    """Remove the least important channels of a network, in place.

    Args:
        model: any network that can be traced; classifiers and other outputs keep their width.
        example_inputs: the arguments of one forward pass (a tensor stands for one argument).
        criterion: a name from ``list_criteria()``.
        ratio: the share of every layer's channels to remove (default 0.5 where no budget is given).
        **options: further arguments of :func:`plan_pruning`, such as ``target_macs``.

    Returns:
        ``model``, smaller, in eval mode.

    Raises:
        DScoreError: on bad input, before anything is changed.
    """
    inputs = as_arguments(example_inputs)
    if ratio is None and not any(options.get(key) is not None for key in GOALS):
        ratio = 0.5
    return plan_pruning(model, inputs, criterion, ratio=ratio, **options).apply(model, inputs, strict=False)


def plan_pruning(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    criterion: str = "d_score",
    *,
    ratio: float | None = None,
    target_macs: float | None = None,
    target_params: float | None = None,
    target_latency: float | None = None,
    threshold: float | None = None,
    max_drop: float | None = None,
    allocation: str = "uniform",
    sensitivity: Sensitivity | None = None,
    layers: str = "all",
    ignored_layers: Sequence[nn.Module] = (),
    min_channels: int = 1,
    round_to: int | None = None,
    criterion_options: Mapping[str, Any] | None = None,
    batches: Batches = (),
    latency_batch: int = 1,
    rerank: Sequence[float] = (),
    seed: int = 0,
) -> Plan:
    """Choose what leaves a network; the network is not touched.

    Args:
        model: any network that can be traced.
        example_inputs: the arguments of one forward pass (a tensor stands for one argument).
        criterion: a name from ``list_criteria()``, of kind ``score`` or ``data_score``.
        ratio: the share of channels to remove: ``floor(ratio * n + 1e-9)`` of every group (uniform), or of all.
        target_macs: the share of the MACs to keep, instead of ``ratio``; met from below.
        target_params: the share of the parameters to keep, instead of ``ratio``; met from below.
        target_latency: the share of the latency to keep, measured on this machine; met within 5 %.
        threshold: the accuracy in percent that every layer, pruned alone, must keep (the paper's rule).
        max_drop: the same, as points below the dense accuracy.
        allocation: ``"uniform"`` (the same share of every group), ``"global"`` (the lowest scores overall) or
            ``"sensitivity"`` (the layers that hurt least give most: one threshold accuracy for all).
        sensitivity: the measured table, for ``"sensitivity"``.
        layers: ``"all"`` groups, or ``"inner"``: those with a single producer, which leaves residual sums whole.
        ignored_layers: modules whose channels stay; a container stands for everything in it.
        min_channels: channels that every layer keeps at least.
        round_to: make the channels that remain a multiple of it.
        criterion_options: keyword arguments of the criterion's importance class.
        batches: images ``(b, c, h, w)`` and labels ``(b,)``, for criteria that need data.
        latency_batch: images at a time, for ``target_latency``: the example inputs in batches of that size.
        rerank: score what is left of a layer anew at each of these ratios, as D-Score's code does.
        seed: for criteria that draw random numbers.

    Returns:
        The plan.

    Raises:
        CriterionError: if the criterion or an option is unknown, or data it needs are missing.
        BudgetError: if the ratio or the budget is out of range or cannot be reached, or there are none or several;
            if the model does not run on ``latency_batch`` images at a time.
        ModelError: if the model cannot be traced, holds NaN, or nothing in it can be pruned; if it or an ignored layer
            is no module.
    """
    inputs = as_arguments(example_inputs)
    goals = {"ratio": ratio, "target_macs": target_macs, "target_params": target_params}
    goals |= {"target_latency": target_latency, "threshold": threshold, "max_drop": max_drop}
    goal, amount = check_goals(goals, allocation)
    check_layers(layers)
    info = get_criterion(criterion)
    graph = PruningGraph(model, inputs, ignored_layers)
    timed = _timed_inputs(graph, latency_batch) if goal == "target_latency" else ()
    scored = score_groups(graph, info, criterion_options, layers=layers, batches=batches, seed=seed)
    if rerank:
        scored = rerank_groups(graph, info, scored, rerank)
    limits = Limits(scored, min_channels, round_to)
    search = _Search(graph, scored, limits, sensitivity, timed)
    counts = search.counts(allocation, goal, amount)
    made_by = {"criterion": criterion, "allocation": allocation, goal: amount, "layers": layers, "seed": seed}
    made_by |= {"min_channels": min_channels, "round_to": round_to}
    if allocation == "sensitivity" and sensitivity:
        made_by["sensitivity"] = {"images": sensitivity.images, "protocol": sensitivity.protocol}
    if goal == "target_latency":
        made_by["latency_batch"] = latency_batch
    return build_plan(graph, scored, counts, made_by)


def selection_request(
    example_inputs: tuple[Any, ...],
    granularity: str,
    goal: str,
    amount: float,
    *,
    layers: str = "all",
    ignored_layers: Sequence[nn.Module] = (),
    min_channels: int = 1,
    round_to: int | None = None,
    latency_batch: int = 1,
    seed: int = 0,
    work: FilePath | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Request:
    """Put together what a selector is asked for.

    Args:
        example_inputs: the arguments of one forward pass.
        granularity: ``"channel"``, ``"kernel"`` or ``"layer"``.
        goal: ``"ratio"``, ``"target_macs"``, ``"target_params"``, ``"target_latency"`` or ``"keep_layers"``.
        amount: its value.
        layers: ``"all"`` groups, or ``"inner"``, as in :func:`plan_pruning`.
        ignored_layers: modules whose channels stay.
        min_channels: channels that every layer keeps at least.
        round_to: make the channels that remain a multiple of it.
        latency_batch: images at a time, for ``target_latency``.
        seed: of everything random.
        work: a folder for checkpoints.
        progress: shows bars.
        say: takes a line of news now and then.

    Raises:
        BudgetError: if ``layers`` is unknown.
    """
    check_layers(layers)

    def trace(model: nn.Module) -> PruningGraph:
        return PruningGraph(model, example_inputs, ignored_layers)

    def allot(graph: Any, scored: Sequence[ScoredGroup]) -> Counts:
        limits = Limits(scored, min_channels, round_to)
        if goal != "target_latency":
            return _Search(graph, scored, limits, None, ()).counts("uniform", goal, amount)
        note = work / "allotment.json" if work else None  # measured again, it would be another one
        if note and note.exists():
            return {name: int(units) for name, units in read_json(note).items()}
        timed = _timed_inputs(graph, latency_batch)
        counts = _Search(graph, scored, limits, None, timed).counts("uniform", goal, amount)
        if note:
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, counts)
        return counts

    return Request(
        example_inputs, granularity, goal, amount, seed, work, progress or NoProgress(), say,
        trace=trace,
        groups=lambda graph: [g for g in graph.prunable if layers == "all" or g.is_inner],
        allot=allot,
        write=build_plan,  # type: ignore[arg-type]
    )  # fmt: skip


def score_groups(
    graph: PruningGraph,
    info: CriterionInfo,
    options: Mapping[str, Any] | None = None,
    *,
    layers: str = "all",
    batches: Batches = (),
    seed: int = 0,
) -> list[ScoredGroup]:
    """Score every prunable group of a traced network.

    Args:
        graph: the traced network.
        info: the criterion.
        options: keyword arguments of its importance class.
        layers: ``"all"`` or ``"inner"``, as in :func:`plan_pruning`.
        batches: images and labels, for criteria that need data.
        seed: for criteria that draw random numbers.

    Raises:
        CriterionError: if the criterion is no importance, or data it needs are missing.
        ModelError: if nothing can be pruned, or parameters hold NaN or infinity.
    """
    check_scoring(info)
    if info.needs_data and not batches:
        raise CriterionError(f"criterion {info.name!r} needs images and labels; pass batches=")
    bad = next((name for name, p in graph.model.named_parameters() if not torch.isfinite(p).all()), None)
    if bad is not None:
        raise ModelError(f"the parameter {bad!r} holds NaN or infinity; check the checkpoint")
    groups = [group for group in graph.prunable if layers == "all" or group.is_inner]
    if not groups:
        reasons = "; ".join(
            f"{group.name}: {group.protected or 'a residual sum'}" for group in graph.groups[:5]
        )
        raise ModelError(f"nothing in {type(graph.model).__name__} can be pruned ({reasons})")
    importance = info.build(**(options or {}))
    with torch.random.fork_rng(devices=[]), _gradients(graph.model, batches if info.needs_gradients else ()):
        torch.manual_seed(seed)
        scored = [_score(graph, info, group, importance) for group in groups]
    missing = [group.name for group, item in zip(groups, scored, strict=True) if item is None]
    if missing and info.needs_batchnorm:
        raise CriterionError(
            f"criterion {info.name!r} needs batch norm, but {missing[0]!r} has none behind it"
        )
    found = [item for item in scored if item is not None]
    if not found:
        raise CriterionError(f"criterion {info.name!r} scores none of the {len(groups)} groups")
    return found


def rerank_groups(
    graph: PruningGraph, info: CriterionInfo, scored: Sequence[ScoredGroup], ratios: Sequence[float]
) -> list[ScoredGroup]:
    """Order the units step by step, each time scoring what is left of the root layer, as D-Score's code does.

    Args:
        graph: the traced network.
        info: a criterion with a pure function of the filters.
        scored: the groups.
        ratios: the steps.

    Returns:
        The groups with the place in the order, from 0 to 1, for a score.

    Raises:
        CriterionError: if the criterion has no such function, or a group is tied to a grouped layer.
    """
    check_reranking(info)
    divided = next((item.group.name for item in scored if item.group.division > 1), None)
    if divided is not None:
        raise CriterionError(
            f"{divided!r} feeds a grouped layer and cannot be ranked step by step; leave --rerank out"
        )
    criterion = load_object(info.function)

    def rescore(item: ScoredGroup, left: Tensor) -> Tensor:
        root = next(producers(graph.depgroups[item.group.name]))
        scores: Tensor = criterion(root.filters[left])
        return scores

    return reranked(scored, ratios, rescore)


def build_plan(
    graph: PruningGraph, scored: Sequence[ScoredGroup], counts: Counts, made_by: Mapping[str, Any]
) -> Plan:
    """Write down the least important ``counts[name]`` units of each group as a plan."""
    table, rows = graph.costs, []
    for item in scored:
        group, count = item.group, counts[item.group.name]
        saved = table.saving({}, group.name, count).macs
        low, high = float(item.scores.min()), float(item.scores.max())
        cut = float(item.scores[item.order[count - 1]]) if count else None
        rows.append(LayerRow(group.name, group.channels, low, high, cut, round(saved)))
    dense, left = table.dense, table.cost(counts)
    image = next((x for x in graph.example_inputs if isinstance(x, Tensor)), torch.empty(0))
    return Plan(
        fingerprint(graph.model),
        tuple(image.shape[1:]),
        _removals(scored, counts),
        tuple(rows),
        (round(dense.macs), round(left.macs)),
        (round(dense.params), round(left.params)),
        dict(made_by),
    )


def check_layers(layers: str) -> None:
    """Refuse a name for a set of layers that is unknown; raise BudgetError."""
    _check_choice("layers", layers, LAYERS)


def check_scoring(info: CriterionInfo) -> None:
    """Refuse a criterion that scores no channels; raise CriterionError."""
    if info.kind not in ("score", "data_score") or "channel" not in info.granularity:
        way = "" if info.kind == "trained" else f"; run it with: dscore prune --criterion {info.name}"
        raise CriterionError(
            f"criterion {info.name!r} is of kind {info.kind!r} and scores no channels on its own{way}"
        )


def check_reranking(info: CriterionInfo) -> None:
    """Refuse a criterion that has no function of a layer's filters; raise CriterionError."""
    if not info.function:
        raise CriterionError(f"criterion {info.name!r} cannot score part of a layer; leave --rerank out")


def check_goals(goals: Mapping[str, float | None], allocation: str) -> tuple[str, float]:
    """Return the one goal that is given, and its value.

    Args:
        goals: ``ratio``, ``target_macs``, ``target_params``, ``target_latency``, ``threshold``, ``max_drop``, and
            ``keep_layers`` where layers leave.
        allocation: ``threshold`` and ``max_drop`` need ``"sensitivity"``.

    Raises:
        BudgetError: if there is not exactly one, it is out of range, or it does not go with the allocation.
    """
    _check_choice("allocation", allocation, ALLOCATIONS)
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) != 1:
        raise BudgetError(f"give exactly one of {', '.join(goals)}; got {' and '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if name == "keep_layers":
        if value < 1:
            raise BudgetError(f"keep_layers must be at least 1, got {value:g}")
    elif name not in ("threshold", "max_drop"):
        check_fraction(name, value)
    elif not 0 < value < 100:
        raise BudgetError(f"{name} must lie between 0 and 100 percent (exclusive), got {value:g}")
    elif allocation != "sensitivity":
        raise BudgetError(f"{name} needs the allocation 'sensitivity', got {allocation!r}")
    return name, value


@dataclass(frozen=True)
class _Search:
    """Finds how many units leave each group; ``timed`` are the arguments of the calls that are timed."""

    graph: PruningGraph
    scored: Sequence[ScoredGroup]
    limits: Limits
    sensitivity: Sensitivity | None
    timed: tuple[Any, ...]

    def counts(self, allocation: str, goal: str, amount: float) -> Counts:
        """Return the units that leave each group when ``goal`` is met by an allocation of this kind."""
        if allocation == "sensitivity":
            return self._by_sensitivity(goal, amount)
        path = (UniformPath if allocation == "uniform" else GlobalPath)(self.scored, self.limits)
        return path.at(amount) if goal == "ratio" else self._meet(path, goal, amount)

    def _by_sensitivity(self, goal: str, amount: float) -> Counts:
        table = self.sensitivity
        if table is None:
            raise BudgetError("the allocation 'sensitivity' needs a measured table; pass sensitivity=")
        if table.fingerprint != fingerprint(self.graph.model):
            raise PlanError(
                "the sensitivity table was measured on another model or other weights; measure it again"
            )
        path = SensitivityPath(table, self.scored, self.limits)
        if goal not in ("threshold", "max_drop"):
            return self._meet(path, goal, amount)
        threshold = amount if goal == "threshold" else table.dense_top1 - amount
        table.ratios_at(threshold)  # refuses a threshold that the table knows nothing of
        return path.counts(threshold)

    def _meet(self, path: Path, goal: str, amount: float) -> Counts:
        if goal == "target_latency":
            return meet_latency(path, self._latency, amount)
        if goal == "ratio":
            units = sum(item.group.units for item in self.scored)
            return self._meet_share(path, lambda counts: 1 - total(counts) / units, 1 - amount, goal)
        table, unit = self.graph.costs, goal.removeprefix("target_")
        dense = getattr(table.dense, unit)
        return self._meet_share(path, lambda counts: getattr(table.cost(counts), unit) / dense, amount, goal)

    def _meet_share(self, path: Path, measure: Measure, share: float, goal: str) -> Counts:
        return meet(path, measure, share, self.scored, self.limits, goal)

    def _latency(self, counts: Counts) -> float:
        """Measure what an allocation leaves of the latency: a pruned copy against the dense network, in turns."""
        pruned = copy.deepcopy(self.graph.model)
        remove_channels(pruned, self.graph.example_inputs, _removals(self.scored, counts))
        ratios = []
        for _ in range(3):
            dense, left = (
                call_latency(net, self.timed, min_run_time=0.15)["median"]
                for net in (self.graph.model, pruned)
            )
            ratios.append(left / dense)
        return statistics.median(ratios)


def _timed_inputs(graph: PruningGraph, images: int) -> tuple[Any, ...]:
    """Make batches like the example inputs: random numbers where they are real, copies of the first where not."""
    if images < 1:
        raise BudgetError(f"latency_batch must be at least 1, got {images}")
    size = next((len(x) for x in graph.example_inputs if isinstance(x, Tensor) and x.ndim), 1)
    generator = torch.Generator().manual_seed(0)

    def batch(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.ndim or len(x) != size:
            return x
        copies = x[:1].repeat(images, *[1] * (x.ndim - 1))
        return torch.randn(copies.shape, generator=generator).to(x) if x.is_floating_point() else copies

    inputs = tuple(batch(x) for x in graph.example_inputs)
    try:
        with in_eval_mode(graph.model), torch.no_grad():
            graph.model(*inputs)
    except Exception as error:
        raise BudgetError(
            f"{type(graph.model).__name__} does not run with latency_batch={images}: {error}; choose another, or give "
            "another goal than target_latency"
        ) from error
    return inputs


def _removals(scored: Sequence[ScoredGroup], counts: Counts) -> tuple[ChannelRemoval, ...]:
    return tuple(
        ChannelRemoval(item.group.name, item.group.root_channels(item.order[: counts[item.group.name]]))
        for item in scored
        if counts[item.group.name]
    )


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise BudgetError(f"{name} {value!r} is unknown; expected one of {', '.join(choices)}")


def _score(
    graph: PruningGraph, info: CriterionInfo, group: ChannelGroup, importance: Callable[[Any], Any]
) -> ScoredGroup | None:
    try:
        scored = graph.score(group, importance)
    except DScoreError:
        raise
    except Exception as error:  # Torch-Pruning's FPGM, for one, fails in front of grouped convolutions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CriterionError(
            f"criterion {info.name!r} cannot score {group.name!r}: {reason}; choose another, or ignore the layer"
        ) from error
    if scored is not None and not torch.isfinite(scored.scores).all():
        raise CriterionError(f"criterion {info.name!r} gives NaN or infinity for {group.name!r}")
    return scored


@contextmanager
def _gradients(model: nn.Module, batches: Batches) -> Iterator[None]:
    """Fill ``.grad`` with the gradient of the cross-entropy summed over batches; put the old ones back on exit."""
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()] if batches else []
    try:
        for p, _, _ in parameters:
            p.grad = None
            p.requires_grad_(True)
        with modes_kept(model):
            _accumulate(model, batches)
            yield
    finally:
        for p, grad, requires_grad in parameters:
            p.grad = grad
            p.requires_grad_(requires_grad)


def _accumulate(model: nn.Module, batches: Batches) -> None:
    model.eval()
    with torch.enable_grad():
        for images, labels in batches:
            nn.functional.cross_entropy(model(images), labels, reduction="sum").backward()
