"""Choose the input channels of one layer greedily, by the gradient of a joint loss: the inner loop of DCP.

Every channel costs two passes over the images: one for the gradient, one that optimises the layer with the channel.
Only the part of the network between the layer and its loss is run for them. What the layer reads, with all layers
before it as they were pruned, and what it gave in the unpruned network are computed once and kept in memory.

Where a norm averages over the channels to choose (group norm, layer norm), the layer is optimised and its loss taken
with a norm that counts the chosen ones alone, as removal leaves it. For the gradient, which ranks those that are not
chosen yet, it counts all of them.

Source: Zhuang et al., *Discrimination-aware Channel Pruning for Deep Neural Networks*, arXiv 1810.11809, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dscore_plugin.criteria.discrimination_aware import channel_scores, has_settled, joint_loss
from dscore_plugin.groups import ChannelGroup, Role
from dscore_plugin.masking import Silenced, masked
from dscore_plugin.selection.measurement import placed, silenced_modules
from dscore_plugin.selection.replay import Prefix, Recording, Replay
from dscore_plugin.training.evaluation import check_logits
from dscore_plugin.training.heads import Batch, Heads, frozen_copy
from dscore_plugin.training.precision import set_memory_format


@dataclass(frozen=True)
class GreedyOptions:
    """How channels are chosen.

    Attributes:
        strength: lambda, the weight of the discrimination-aware loss.
        reading: of the score, ``"kernels"`` or ``"slice"``.
        channels_per_step: channels that are added between two optimisations.
        epsilon: stop where the relative change of the loss is at most this (DCP-Adapt); None stops at the number.
        learning_rate: of the optimisation, one pass of SGD with Nesterov's momentum.
        momentum: of the same.
        weight_decay: of the same.
    """

    strength: float = 1.0
    reading: str = "kernels"
    channels_per_step: int = 1
    epsilon: float | None = None
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4


@dataclass(frozen=True)
class LayerTask:
    """A layer whose inputs are chosen.

    Attributes:
        layer: qualified name of a convolution without groups.
        units: the unit that each of its input channels belongs to, int64, shape ``(c,)``; units count from 0.
        end: the module behind which its loss stands; empty for the network's own.
        keep: units to choose; with ``epsilon`` the fewest.
        group: whose units they are; None stands for one that no norm averages over.
    """

    layer: str
    units: Tensor
    end: str
    keep: int
    group: ChannelGroup | None = None

    @property
    def size(self) -> int:
        """How many units there are."""
        return int(self.units.max()) + 1


@dataclass(frozen=True)
class Chosen:
    """What was chosen for a layer.

    Attributes:
        order: the units that stay, in the order in which they were taken.
        losses: the joint loss before each step, and with ``epsilon`` after the last.
        weight: of the layer, optimised; zero where a unit does not stay.
    """

    order: tuple[int, ...]
    losses: tuple[float, ...]
    weight: Tensor


class _ReachedError(BaseException):
    """Leaves a pass where nothing behind is needed; no Exception, so that no forward() takes it for one of its own."""


class _Network:
    """A frozen network that runs from a layer on.

    Args:
        model: copied, in float32 and eval mode.
        batches: images and labels, on the device.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.model: nn.Module = frozen_copy(model)
        set_memory_format(self.model, torch.channels_last)
        self._batches = batches
        self._replay = Replay(self.model, batches[0][0][:2])
        self._recordings: list[Recording | None] = [None] * len(batches)

    def before(self, layer: str, norms: Sequence[nn.Module] = ()) -> Prefix:
        """Return what comes before a layer, and before the norms whose channels are chosen with it."""
        return self._replay.prefix([self.model.get_submodule(layer), *norms])

    def record(self, prefix: Prefix, kept: int) -> None:
        """Record a prefix for the first ``kept`` batches; the others are computed every time."""
        few = self._batches[0][0][:2]
        with torch.no_grad():
            expected, recorded = self._replay.run(few), self._replay.record(prefix, few)
            self._recordings[kept:] = [None] * len(self._recordings[kept:])
            for place, recording in enumerate(self._recordings[:kept]):
                self._recordings[place] = self._replay.record(prefix, self._batches[place][0], recording)
            if not self._replay.agrees(few, recorded, expected):  # other batches have come in between
                self._recordings = [None] * len(self._recordings)

    def run(self, place: int, layer: str, end: str | None) -> tuple[Tensor, Tensor | None]:
        """Run a batch.

        Args:
            place: of the batch.
            layer: whose output to give.
            end: whose output to give, too, and to stop behind; None stops behind the layer, ``""`` nowhere.

        Returns:
            The outputs of the layer, and of the end (of the network, for ``""``).
        """
        with _seen(self.model, layer, end) as seen, suppress(_ReachedError):
            seen[""] = self._replay.run(self._batches[place][0], self._recordings[place])
        return seen[layer], None if end is None else seen[end]


@contextmanager
def _seen(model: nn.Module, layer: str, end: str | None) -> Iterator[dict[str, Any]]:
    """Note what a layer and an end give, and leave the pass behind the last of them."""
    outputs: dict[str, Any] = {}

    def watch(name: str, last: bool) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if last:
                outputs[name] = output
                raise _ReachedError
            outputs[name] = output.clone()  # what follows may change it in place

        return note

    names = [layer] if not end else [layer, end]
    handles = [
        model.get_submodule(name).register_forward_hook(watch(name, end != "" and name == names[-1]))
        for name in names
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class GreedySelection:
    """Chooses the inputs of one layer after the other; each sees those before it as they were pruned.

    Args:
        reference: the network before pruning, with the heads tuned: gives the outputs to be reconstructed.
        pruned: the network with some layers pruned already, the inputs that left set to zero; it is copied.
        heads: of both.
        batches: images and labels to choose by, in a fixed order.
        options: how.
        memory_limit: bytes for what is kept in memory besides the images.
        gone: the units that left before, in the reference and in the pruned network; no norm counts them.
    """

    reference: nn.Module
    pruned: nn.Module
    heads: Heads
    batches: Sequence[Batch]
    options: GreedyOptions
    memory_limit: int = 2 * 2**30
    gone: tuple[Silenced, Silenced] = ((), ())
    _networks: tuple[_Network, _Network] = field(init=False)

    def __post_init__(self) -> None:
        like = next(self.pruned.parameters()).detach().float()
        self.batches = [placed(batch, like) for batch in self.batches]
        self._gone = tuple([(_norms(group), tuple(units)) for group, units in part] for part in self.gone)
        self.heads = frozen_copy(self.heads)
        self._networks = _Network(self.reference, self.batches), _Network(self.pruned, self.batches)

    def choose(self, task: LayerTask, advance: Callable[[int], Any] = lambda _: None) -> Chosen:
        """Choose a layer's inputs; the layers behind it will see it so.

        Args:
            task: the layer; tasks come in the order of the network.
            advance: takes the number of units that were added.
        """
        (reference, pruned), (gone_before, gone) = self._networks, self._gone
        with (
            masked(reference.model, gone_before),
            masked(pruned.model, gone),
            torch.autocast(self.batches[0][0].device.type, enabled=False),
        ):
            problem = _LayerProblem(
                task, self._networks, self.heads, self.batches, self.options.strength, gone
            )
            problem.prepare(self.memory_limit)
            with torch.enable_grad():
                chosen = _greedy(problem, task, self.options, advance)
        if task.group is not None:
            gone.append((_norms(task.group), tuple(set(range(task.size)) - set(chosen.order))))
        return chosen


def _norms(group: ChannelGroup) -> ChannelGroup:
    """Leave of a group what its norms make of it: what the layers read is zero by their weights."""
    return replace(group, members=group.roles(Role.NORM))


class _LayerProblem:
    """The joint loss of one layer as a function of its weight."""

    def __init__(
        self,
        task: LayerTask,
        networks: tuple[_Network, _Network],
        heads: Heads,
        batches: Sequence[Batch],
        strength: float,
        gone: Silenced,
    ) -> None:
        self._task = task
        self._reference, self._pruned = networks
        self._head = heads.of(task.end) if task.end else None
        self._batches = batches
        self._strength = strength
        self._images = sum(len(labels) for _, labels in batches)
        self._targets: list[Tensor] = []
        self.convolution = self._pruned.model.get_submodule(task.layer)
        self._gone = gone
        self.norms = [] if task.group is None else silenced_modules(self._pruned.model, _norms(task.group))

    @property
    def weight(self) -> Tensor:
        """The layer's weight, a leaf that takes gradients."""
        weight = self.convolution.weight
        assert isinstance(weight, nn.Parameter)
        return weight.requires_grad_(True)

    def prepare(self, memory_limit: int) -> None:
        """Record what comes before the layer and what it gives in the unpruned network, as far as memory allows."""
        layer = self._task.layer
        before = self._reference.before(layer), self._pruned.before(layer, self.norms)
        with torch.no_grad():
            output = self._reference.run(0, layer, None)[0]
            size = len(self._batches[0][1]) * sum(prefix.bytes_per_image for prefix in before)
            kept = min(len(self._batches), memory_limit // max(1, size + output.nbytes))
            for network, prefix in zip((self._reference, self._pruned), before, strict=True):
                network.record(prefix, kept)
            self._targets = [self._reference.run(place, layer, None)[0] for place in range(kept)]

    def gradient(self) -> tuple[Tensor, float]:
        """Return the gradient of the joint loss over all images, and the loss, norms counting all channels."""
        total, loss = torch.zeros_like(self.weight), 0.0
        for place in range(len(self._batches)):
            part = self._share_of_loss(place)
            total += torch.autograd.grad(part, self.weight)[0]
            loss += float(part.detach())
        return total, loss

    @torch.no_grad()
    def loss(self, chosen: Tensor) -> float:
        """Return the joint loss over all images, norms counting the ``chosen`` units alone: bool, ``(units,)``."""
        with self._counting(chosen):
            return sum(float(self._share_of_loss(place)) for place in range(len(self._batches)))

    def optimise(self, chosen: Tensor, options: GreedyOptions) -> None:
        """Take one pass of SGD over the images on the inputs of the ``chosen`` units: bool, ``(units,)``."""
        weight = self.weight
        mask = chosen[self._task.units.to(chosen.device)].to(weight).view(1, -1, *[1] * (weight.ndim - 2))
        optimizer = torch.optim.SGD(
            [weight], options.learning_rate, options.momentum, 0.0, options.weight_decay, options.momentum > 0
        )
        with self._counting(chosen):
            for place in range(len(self._batches)):
                weight.grad = torch.autograd.grad(self._loss(place), weight)[0] * mask
                optimizer.step()
        weight.grad = None

    def _counting(self, chosen: Tensor) -> AbstractContextManager[None]:
        """Let norms over the channels count the chosen units alone."""
        if self._task.group is None or not self.norms:
            return nullcontext()
        left_out = (~chosen).nonzero().flatten().tolist()
        return masked(self._pruned.model, [*self._gone, (_norms(self._task.group), left_out)])

    def _share_of_loss(self, place: int) -> Tensor:
        """Return what a batch adds to the mean of the joint loss over all images."""
        return self._loss(place) * (len(self._batches[place][1]) / self._images)

    def _loss(self, place: int) -> Tensor:
        task, labels = self._task, self._batches[place][1]
        if not self._strength:
            output, _ = self._pruned.run(place, task.layer, None)
            return joint_loss(output, self._target(place), None, labels, 0.0)
        output, feature = self._pruned.run(place, task.layer, task.end)
        logits = check_logits(feature if self._head is None else self._head(feature), labels)
        return joint_loss(output, self._target(place), logits, labels, self._strength)

    def _target(self, place: int) -> Tensor:
        if place < len(self._targets):
            return self._targets[place]
        with torch.no_grad():
            return self._reference.run(place, self._task.layer, None)[0]


def _greedy(
    problem: _LayerProblem, task: LayerTask, options: GreedyOptions, advance: Callable[[int], Any]
) -> Chosen:
    weight = problem.weight
    tuned, units = weight.detach().clone(), task.units.to(weight.device)
    weight.data.zero_()
    chosen = torch.zeros(task.size, dtype=torch.bool, device=weight.device)
    order: list[int] = []
    losses: list[float] = []
    most = task.keep if options.epsilon is None else task.size
    while len(order) < most:
        gradient, loss = problem.gradient()
        losses.append(problem.loss(chosen) if problem.norms and order else loss)
        if _is_enough(losses, len(order) >= task.keep, options.epsilon):
            break
        scores = torch.zeros(task.size, device=weight.device)
        scores.index_add_(0, units, channel_scores(gradient, options.reading))
        scores[chosen] = -1.0
        best = torch.argsort(scores, descending=True, stable=True)
        taken = best[: min(options.channels_per_step, most - len(order))]
        order += taken.tolist()
        chosen[taken] = True
        fresh = torch.isin(units, taken)
        weight.data[:, fresh] = tuned[:, fresh]  # warm start
        problem.optimise(chosen, options)
        advance(len(taken))
    problem.weight.requires_grad_(False)
    return Chosen(tuple(order), tuple(losses), weight.detach().clone())


def _is_enough(losses: Sequence[float], has_fewest: bool, epsilon: float | None) -> bool:
    if epsilon is None or len(losses) < 2 or not has_fewest:
        return False
    return has_settled(losses[-2], losses[-1], losses[0], epsilon)
