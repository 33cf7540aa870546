"""Choose the input channels of one layer greedily, by the gradient of a joint loss: the inner loop of DCP.

Every channel costs two passes over the images: one for the gradient, one that optimises the layer with the channel.
Only the part of the network between the layer and its loss is run for them. What the layer reads, with all layers
before it as they were pruned, and what it gave in the unpruned network are computed once and kept in memory.

Source: Zhuang et al., *Discrimination-aware Channel Pruning for Deep Neural Networks*, arXiv 1810.11809, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dscore_plugin.criteria.discrimination_aware import channel_scores, has_settled, joint_loss
from dscore_plugin.selection.replay import Recording, Replay
from dscore_plugin.training.evaluation import check_logits
from dscore_plugin.training.heads import Batch, Heads, frozen_copy


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
    """

    layer: str
    units: Tensor
    end: str
    keep: int

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
        self.model: nn.Module = frozen_copy(model).to(memory_format=torch.channels_last)
        self._batches = batches
        self._replay = Replay(self.model, batches[0][0][:2])
        self._recordings: list[Recording | None] = [None] * len(batches)

    def bytes_per_image(self, layer: str) -> int:
        """Return the memory that :meth:`record` takes for each image."""
        return self._replay.prefix([self.model.get_submodule(layer)]).bytes_per_image

    def record(self, layer: str, kept: int) -> None:
        """Record what comes before a layer, for the first ``kept`` batches; the others are computed every time."""
        prefix = self._replay.prefix([self.model.get_submodule(layer)])
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
            outputs[name] = output
            if last:
                raise _ReachedError

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
    """

    reference: nn.Module
    pruned: nn.Module
    heads: Heads
    batches: Sequence[Batch]
    options: GreedyOptions
    memory_limit: int = 2 * 2**30
    _networks: tuple[_Network, _Network] = field(init=False)

    def __post_init__(self) -> None:
        like = next(self.pruned.parameters())
        self.batches = [
            (_placed(images, like.device), labels.to(like.device)) for images, labels in self.batches
        ]
        self.heads = frozen_copy(self.heads)
        self._networks = _Network(self.reference, self.batches), _Network(self.pruned, self.batches)

    def choose(self, task: LayerTask, advance: Callable[[int], Any] = lambda _: None) -> Chosen:
        """Choose a layer's inputs; the layers behind it will see it so.

        Args:
            task: the layer; tasks come in the order of the network.
            advance: takes the number of units that were added.
        """
        problem = _LayerProblem(task, self._networks, self.heads, self.batches, self.options.strength)
        problem.prepare(self.memory_limit)
        with torch.autocast(next(iter(self.batches))[0].device.type, enabled=False), torch.enable_grad():
            return _greedy(problem, task, self.options, advance)


def _placed(images: Tensor, device: torch.device) -> Tensor:
    layout = torch.channels_last if images.ndim == 4 else torch.preserve_format
    return images.to(device, torch.float32, memory_format=layout)


class _LayerProblem:
    """The joint loss of one layer as a function of its weight."""

    def __init__(
        self,
        task: LayerTask,
        networks: tuple[_Network, _Network],
        heads: Heads,
        batches: Sequence[Batch],
        strength: float,
    ) -> None:
        self._task = task
        self._reference, self._pruned = networks
        self._head = heads.of(task.end) if task.end else None
        self._batches = batches
        self._strength = strength
        self._images = sum(len(labels) for _, labels in batches)
        self._targets: list[Tensor] = []
        self.convolution = self._pruned.model.get_submodule(task.layer)

    @property
    def weight(self) -> Tensor:
        """The layer's weight, a leaf that takes gradients."""
        weight = self.convolution.weight
        assert isinstance(weight, nn.Parameter)
        return weight.requires_grad_(True)

    def prepare(self, memory_limit: int) -> None:
        """Record what comes before the layer and what it gives in the unpruned network, as far as memory allows."""
        layer = self._task.layer
        with torch.no_grad():
            output = self._reference.run(0, layer, None)[0]
            images = len(self._batches[0][1])
            size = images * sum(network.bytes_per_image(layer) for network in (self._reference, self._pruned))
            kept = min(len(self._batches), memory_limit // max(1, size + output.nbytes))
            for network in (self._reference, self._pruned):
                network.record(layer, kept)
            self._targets = [self._reference.run(place, layer, None)[0] for place in range(kept)]

    def gradient(self) -> tuple[Tensor, float]:
        """Return the gradient of the joint loss over all images, and the loss."""
        total, loss = torch.zeros_like(self.weight), 0.0
        for place, (_, labels) in enumerate(self._batches):
            part = self._loss(place) * (len(labels) / self._images)
            total += torch.autograd.grad(part, self.weight)[0]
            loss += float(part.detach())
        return total, loss

    def optimise(self, chosen: Tensor, options: GreedyOptions) -> None:
        """Take one pass of SGD over the images on the chosen input channels; ``chosen`` has shape ``(c,)``, bool."""
        weight = self.weight
        mask = chosen.to(weight).view(1, -1, *[1] * (weight.ndim - 2))
        optimizer = torch.optim.SGD(
            [weight], options.learning_rate, options.momentum, 0.0, options.weight_decay, options.momentum > 0
        )
        for place in range(len(self._batches)):
            weight.grad = torch.autograd.grad(self._loss(place), weight)[0] * mask
            optimizer.step()
        weight.grad = None

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
        losses.append(loss)
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
        problem.optimise(chosen[units], options)
        advance(len(taken))
    problem.weight.requires_grad_(False)
    return Chosen(tuple(order), tuple(losses), weight.detach().clone())


def _is_enough(losses: Sequence[float], has_fewest: bool, epsilon: float | None) -> bool:
    if epsilon is None or len(losses) < 2 or not has_fewest:
        return False
    return has_settled(losses[-2], losses[-1], losses[0], epsilon)
