"""Coarse pruning as a selector: the best of N random masks becomes a plan."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Container, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dscore_plugin.criteria.coarse import TEMPERATURE
from dscore_plugin.datasets import ImageData
from dscore_plugin.errors import BudgetError, CriterionError, ModelError
from dscore_plugin.groups import ChannelGroup, Role, ScoredGroup, removal_count
from dscore_plugin.loading import load_object
from dscore_plugin.modes import in_eval_mode
from dscore_plugin.plan import KernelRemoval, LayerRow, Plan, fingerprint
from dscore_plugin.registry import CriterionInfo, get_criterion, list_criteria
from dscore_plugin.selection.allocation import Counts
from dscore_plugin.selection.budget import check_fraction
from dscore_plugin.selection.candidates import Options, Pool, Search, search
from dscore_plugin.selection.selector import Graph, Request

UNIFORM = "uniform"
UNITS = ("channel", "kernel")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ScoringGraph(Graph, Protocol):
    """A graph that can ask an importance object for scores."""

    def score(self, group: ChannelGroup, importance: Callable[[Any], Any]) -> ScoredGroup | None:
        """Score the units of a group; None if there is nothing to score."""
        ...


@dataclass(frozen=True)
class Convolution:
    """A convolution in use.

    Attributes:
        name: qualified.
        module: the layer.
        positions: of its output for one image, over all calls: what one weight is multiplied with.
    """

    name: str
    module: nn.Module
    positions: int

    @property
    def kernels(self) -> int:
        """How many kernels it has, one for each connection of an input with an output channel."""
        return self.weight.shape[0] * self.weight.shape[1]

    @property
    def live(self) -> Tensor:
        """The places of the kernels that no earlier plan has removed, ascending, int64."""
        mask = getattr(self.module, "kernel_mask", None)
        return torch.arange(self.kernels) if mask is None else mask.flatten().nonzero().flatten().cpu()

    @property
    def weight(self) -> Tensor:
        """Shape ``(out, in / groups, ...)``."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight


class CoarseSelector:
    """Coarse pruning: draw N masks over the whole network, keep the one that misclassifies least.

    With granularity ``"channel"`` every group of channels gives the same share of its units; groups come from the
    dependency graph, so that residual sums lose the same feature maps everywhere. With ``"kernel"`` every pruned
    convolution gives the same share of its kernels, each chosen freely. The network is not retrained in between and
    not touched. The paper's recipe, feature maps first, retraining, kernels second, retraining, makes one plan for
    each of its two stages.

    Readings: the ratio is the share of units in each layer; the share of weights that leaves is in ``made_by`` as
    ``weights_removed``, of all pruned kinds of convolutions but the first, as the paper counts. What the first
    convolution makes stays whole, with everything that is tied to it (the first stage of a residual network whose
    sums can be pruned), and so do the outputs of linear layers. Depthwise convolutions, and fixed ones
    (``requires_grad=False``) beside trained ones, lose no kernels. Of a convolution that has lost kernels already,
    the ratio is a share of those left.

    Args:
        candidates: how many, or ``"auto"``: doubled until the best stops improving, see
            :func:`dscore_plugin.selection.candidates.search`. The paper: 100 are enough up to a ratio of 0.4.
        proposal: ``"uniform"`` as in the paper, or a criterion that looks at weights alone, such as ``"d_score"``:
            candidates are drawn around its scores, and candidate 0 is its own choice (ours).
        temperature: how far they stray from it, see :func:`dscore_plugin.criteria.coarse.draw_leaving`.
        racing: stop candidates early; at least 3 times fewer evaluations, at some risk of missing the best (ours).
        selection_images: of the validation split, chosen class by class; None takes all, as the paper does.
        skip_first: leave the first convolution whole, as the paper does.
        skip_linear: leave groups whole that a linear layer makes, as the paper does.
        batch_size: images at a time.
        fold_batchnorm: fold batch norms for speed; outputs differ by rounding.

    Raises:
        BudgetError: if a number is out of range.
        CriterionError: if the proposal is unknown or looks at data.

    Source: Anwar and Sung, arXiv 1610.09639, sec. 3 to 5.
    """

    def __init__(
        self,
        candidates: int | Literal["auto"] = 100,
        proposal: str = UNIFORM,
        temperature: float = TEMPERATURE,
        racing: bool = False,
        selection_images: int | None = 1000,
        skip_first: bool = True,
        skip_linear: bool = True,
        batch_size: int = 64,
        fold_batchnorm: bool = True,
    ) -> None:
        if selection_images is not None and selection_images < 1:
            raise BudgetError(f"selection_images must be at least 1, or None for all; got {selection_images}")
        _check_proposal(proposal, *UNITS)
        self._proposal = proposal
        self._images = selection_images
        self._skips = {"skip_first": skip_first, "skip_linear": skip_linear}
        self._options = {
            "candidates": candidates,
            "temperature": temperature,
            "racing": racing,
            "batch_size": batch_size,
            "fold_batchnorm": fold_batchnorm,
        }
        self._search_options(0).check()

    def check(self, granularity: str) -> None:
        """Refuse a granularity that is neither ``"channel"`` nor ``"kernel"``, or that the proposal cannot score.

        Raises:
            CriterionError: if it is so.
        """
        if granularity not in UNITS:
            raise CriterionError(
                f"coarse pruning removes channels or kernels; got the granularity {granularity!r}"
            )
        _check_proposal(self._proposal, granularity)

    def select(self, model: nn.Module, data: ImageData, request: Request) -> Plan:
        """Choose what leaves ``model``; it is not touched.

        Args:
            model: a trained classifier.
            data: candidates are compared on its validation images.
            request: granularity ``"channel"`` or ``"kernel"``; kernels take the goal ``"ratio"`` only.

        Raises:
            CriterionError: if the granularity is another, or the proposal scores no units of this kind.
            BudgetError: if the goal cannot be met, or nothing would leave.
            ModelError: if nothing can be pruned.
        """
        self.check(request.granularity)
        if request.granularity == "channel":
            return self._select_channels(model, data, request)
        return self._select_kernels(model, data, request)

    def _select_channels(self, model: nn.Module, data: ImageData, request: Request) -> Plan:
        graph = request.trace(model)
        convolutions = used_convolutions(model, graph.example_inputs)
        whole = {c.name for c in convolutions[: self._skips["skip_first"]]}
        if self._skips["skip_linear"]:
            whole |= {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        groups = [group for group in request.groups(graph) if not _makes(group, whole)]
        if not groups:
            raise ModelError(
                "no group of channels can be pruned but those of the first convolution and of linear layers; pass "
                "skip_first=False or skip_linear=False"
            )
        scored = [self._scored(graph, group, request) for group in groups]
        counts = request.allot(graph, scored)
        pools = [
            Pool(
                item.group.name,
                item.group.units,
                counts[item.group.name],
                item.group,
                None if self._proposal == UNIFORM else item.scores,
            )
            for item in scored
        ]
        found = self._search(model, pools, data, request)
        marked = [ScoredGroup(item.group, _kept(found, item.group)) for item in scored]
        removed = channel_weights_removed(convolutions[1:], groups, counts)
        return request.write(graph, marked, counts, self._made_by(found, request, removed))

    def _select_kernels(self, model: nn.Module, data: ImageData, request: Request) -> Plan:
        if request.goal != "ratio":
            raise BudgetError(f"kernels leave by ratio; got the goal {request.goal!r}: pass a ratio")
        check_fraction("ratio", request.amount)
        graph = request.trace(model)
        chosen = prunable_kernels(used_convolutions(model, graph.example_inputs), self._skips["skip_first"])
        if not chosen:
            raise ModelError(
                "no convolution has kernels to lose but the first; pass skip_first=False, or prune channels"
            )
        scores = self._kernel_scores(model, graph.example_inputs, chosen)
        pools = [_kernel_pool(c, request.amount, scores.get(c.name)) for c in chosen]
        found = self._search(model, pools, data, request)
        removed = found.winner.removed
        left = sum((len(c.live) - len(removed.get(c.name, ()))) * c.weight[0, 0].numel() for c in chosen)
        made_by = self._made_by(found, request, 1 - left / sum(c.weight.numel() for c in chosen))
        return _kernel_plan(graph, chosen, removed, made_by)

    def _search(self, model: nn.Module, pools: Sequence[Pool], data: ImageData, request: Request) -> Search:
        number = len(data.validation) if self._images is None else min(self._images, len(data.validation))
        images = data.validation.plain()
        images = images if number == len(images) else images.subset(number, seed=request.seed)
        checkpoint = None
        if request.work is not None:  # other stages of the job may lie there, too
            removed = [(pool.name, pool.leaving) for pool in pools]
            stage = f"{fingerprint(model)} {removed} {number} {request.seed} {self._proposal} {self._options}"
            checkpoint = request.work / f"candidates-{hashlib.sha256(stage.encode()).hexdigest()[:16]}.jsonl"
        found = search(
            model,
            pools,
            images,
            self._search_options(request.seed),
            checkpoint=checkpoint,
            resume=True,
            progress=request.progress,
        )
        request.say(
            f"best of {len(found.seen)} candidates: number {found.winner.index}, {found.mcr:.2f} % of "
            f"{found.images} validation images misclassified"
        )
        return found

    def _search_options(self, seed: int) -> Options:
        return Options(seed=seed, **self._options)  # type: ignore[arg-type]

    def _scored(self, graph: Graph, group: ChannelGroup, request: Request) -> ScoredGroup:
        if self._proposal == UNIFORM:
            return ScoredGroup(group, torch.zeros(group.units, dtype=torch.float64))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)  # for criteria that draw random numbers
            scorer: ScoringGraph = graph  # type: ignore[assignment]
            scored = scorer.score(group, get_criterion(self._proposal).build())
        if scored is None:
            raise CriterionError(
                f"the proposal {self._proposal!r} cannot score {group.name!r}; use 'uniform'"
            )
        return scored

    def _kernel_scores(
        self, model: nn.Module, example_inputs: tuple[Any, ...], chosen: Sequence[Convolution]
    ) -> dict[str, Tensor]:
        if self._proposal == UNIFORM:
            return {}
        info = get_criterion(self._proposal)
        scores = load_object(info.kernel_scores)(model, example_inputs)
        missing = next((c.name for c in chosen if c.name not in scores), None)
        if missing is not None:
            raise CriterionError(
                f"the proposal {info.name!r} cannot score the kernels of {missing!r}; use 'uniform'"
            )
        return {c.name: scores[c.name].detach().cpu().double().flatten() for c in chosen}

    def _made_by(self, found: Search, request: Request, weights_removed: float) -> dict[str, Any]:
        return {
            "criterion": "coarse",
            "granularity": request.granularity,
            request.goal: request.amount,
            "seed": request.seed,
            "proposal": self._proposal,
            **self._options,
            **self._skips,
            "selection_images": found.images,
            "candidates_drawn": len(found.seen),
            "image_evaluations": found.evaluations,
            "winner": found.winner.index,
            "winner_mcr": round(found.mcr, 4),
            "best_so_far": _steps(found.best_so_far),
            "weights_removed": round(weights_removed, 4),
        }


def used_convolutions(model: nn.Module, example_inputs: tuple[Any, ...]) -> list[Convolution]:
    """Return the convolutions of a network in the order in which they are first called.

    Args:
        model: its modes are left as they are.
        example_inputs: the arguments of one forward pass.
    """
    names: dict[nn.Module, str] = {
        m: name for name, m in model.named_modules() if isinstance(m, _CONVOLUTIONS)
    }
    positions: Counter[nn.Module] = Counter()

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        positions[module] += output[0, 0].numel()

    with ExitStack() as stack, torch.no_grad(), in_eval_mode(model):
        for module in names:
            stack.callback(module.register_forward_hook(note).remove)
        model(*example_inputs)
    return [Convolution(names[module], module, count) for module, count in positions.items()]


def prunable_kernels(convolutions: Sequence[Convolution], skip_first: bool) -> list[Convolution]:
    """Return those that may lose kernels: not the first, depthwise or fixed ones beside trained ones."""
    trained = any(c.weight.requires_grad for c in convolutions)
    return [
        c
        for c in (convolutions[1:] if skip_first else convolutions)
        if c.weight.shape[1] > 1 and (c.weight.requires_grad or not trained)
    ]


def channel_weights_removed(
    convolutions: Sequence[Convolution], groups: Sequence[ChannelGroup], counts: Counts
) -> float:
    """Return the share of the convolutions' weights that leaves with ``counts`` units of each group."""
    lost: dict[tuple[str, bool], float] = {}
    for group in groups:
        for member in group.roles(Role.PRODUCER, Role.DEPTHWISE, Role.CONSUMER):
            side = (member.module, member.role is Role.CONSUMER)
            share = len(member.index) / group.units / member.width
            lost[side] = lost.get(side, 0.0) + share * counts[group.name]
    dense = sum(c.weight.numel() for c in convolutions)
    left = sum(
        c.weight.numel() * (1 - lost.get((c.name, False), 0.0)) * (1 - lost.get((c.name, True), 0.0))
        for c in convolutions
    )
    return 1 - left / dense if dense else 0.0


def _check_proposal(name: str, *units: str) -> None:
    """Make sure that a proposal scores one of these units by weights alone."""
    if name == UNIFORM or any(_scores(get_criterion(name), unit) for unit in units):
        return
    usable = list_criteria(lambda info: not info.baseline and any(_scores(info, unit) for unit in units))
    raise CriterionError(
        f"the proposal {name!r} does not score {' or '.join(f'{unit}s' for unit in units)} by weights alone; use "
        f"'uniform' or one of {', '.join(info.name for info in usable)}"
    )


def _scores(info: CriterionInfo, unit: str) -> bool:
    return bool(info.kernel_scores) if unit == "kernel" else info.kind == "score" and unit in info.granularity


def _makes(group: ChannelGroup, layers: Container[str]) -> bool:
    """Whether one of these layers makes channels of the group."""
    return any(m.module in layers for m in group.roles(Role.PRODUCER, Role.DEPTHWISE))


def _kept(found: Search, group: ChannelGroup) -> Tensor:
    """Return 0 for the units that the winner removes, and 1 for the others."""
    scores = torch.ones(group.units, dtype=torch.float64)
    scores[found.winner.removed.get(group.name, torch.empty(0, dtype=torch.int64))] = 0
    return scores


def _steps(best_so_far: Sequence[float]) -> list[list[float]]:
    """Keep the points of a curve of the best so far at which it falls: ``[number of candidates, rate]``."""
    falls = [
        [place + 1, round(rate, 4)]
        for place, rate in enumerate(best_so_far)
        if place == 0 or rate < best_so_far[place - 1]
    ]
    return [*falls, [len(best_so_far), falls[-1][1]]] if falls[-1][0] != len(best_so_far) else falls


def _kernel_pool(convolution: Convolution, ratio: float, scores: Tensor | None) -> Pool:
    live = convolution.live
    return Pool(
        convolution.name,
        len(live),
        removal_count(ratio, len(live)),
        scores=None if scores is None else scores[live],
        places=live,
    )


def _kernel_plan(graph: Graph, chosen: Sequence[Convolution], removed: Any, made_by: dict[str, Any]) -> Plan:
    gone = {c.name: tuple(removed[c.name].tolist()) if c.name in removed else () for c in chosen}
    params = {c.name: len(gone[c.name]) * c.weight[0, 0].numel() for c in chosen}
    saved = {c.name: params[c.name] * c.positions for c in chosen}
    rows = [
        LayerRow(
            c.name, c.kernels, 0.0, 1.0, 0.0 if gone[c.name] else None, saved[c.name], KernelRemoval.type
        )
        for c in chosen
    ]
    removals = [KernelRemoval(name, places) for name, places in gone.items() if places]
    image = next(x for x in graph.example_inputs if isinstance(x, Tensor))
    gone_before = {c.name: (c.kernels - len(c.live)) * c.weight[0, 0].numel() for c in chosen}
    macs = round(graph.costs.dense.macs) - sum(gone_before[c.name] * c.positions for c in chosen)
    weights = round(graph.costs.dense.params) - sum(gone_before.values())
    return Plan(
        fingerprint(graph.model),
        tuple(image.shape[1:]),
        tuple(removals),
        tuple(rows),
        (macs, macs - sum(saved.values())),
        (weights, weights - sum(params.values())),
        made_by,
    )
