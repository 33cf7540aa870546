"""Additional losses inside a network: what they are made of, and how they are trained.

Source: Zhuang et al., *Discrimination-aware Channel Pruning for Deep Neural Networks*, arXiv 1810.11809, sec. 3.2 and
Algorithm 1; the authors' code for the weights of the losses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin.arguments import as_arguments
from dscore_plugin.errors import TrainingError
from dscore_plugin.modes import in_eval_mode
from dscore_plugin.training.checkpoint import (
    Checkpoint,
    check_resumable,
    describe_parameters,
    load_checkpoint,
    save_checkpoint,
)
from dscore_plugin.training.config import TrainingConfig, learning_rate_at
from dscore_plugin.training.evaluation import check_logits
from dscore_plugin.training.head_places import Segment
from dscore_plugin.training.history import EpochRecord
from dscore_plugin.training.precision import choose_precision, set_memory_format
from dscore_plugin.training.progress import NoProgress, Progress

Batch = tuple[Tensor, Tensor]
_NORMS: dict[int, type[nn.Module]] = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class Head(nn.Module):
    """Batch norm, ReLU, global average pooling, linear: ``(B, C, ...)`` to logits ``(B, classes)``.

    Args:
        channels: of the feature map.
        classes: outputs.
        ndim: dimensions of the feature map, 3 to 5.
    """

    def __init__(self, channels: int, classes: int, ndim: int = 4) -> None:
        super().__init__()
        self.norm = _NORMS[ndim](channels)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of a feature map."""
        pooled = functional.relu(self.norm(x)).flatten(2).mean(dim=2)
        logits: Tensor = self.linear(pooled)
        return logits


class Heads(nn.Module):
    """The heads of a network, in its order.

    Args:
        segments: from :func:`find_segments`.
        model: the network that they were found in.
        example_inputs: the arguments of one forward pass (a tensor stands for one argument).
        seed: of their initial weights.

    Attributes:
        ends: the modules they read.
        heads: one for each of them.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        model: nn.Module,
        example_inputs: Tensor | tuple[Any, ...],
        seed: int = 0,
    ) -> None:
        super().__init__()
        inputs = as_arguments(example_inputs)
        self.ends = tuple(segment.end for segment in segments if segment.end)
        like = next(model.parameters())
        with tapped(model, self.ends) as features, torch.no_grad(), in_eval_mode(model):
            logits = check_logits(model(*inputs), torch.zeros(len(inputs[0]), dtype=torch.int64))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            shapes = [features[end].shape for end in self.ends]
            self.heads = nn.ModuleList(Head(shape[1], logits.shape[1], len(shape)) for shape in shapes)
        self.to(like.device)

    def logits(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Compute the logits of every head from what :func:`tapped` gave."""
        return [head(features[end]) for end, head in zip(self.ends, self.heads, strict=True)]

    def of(self, end: str) -> nn.Module:
        """Return the head that reads a module's output."""
        return self.heads[self.ends.index(end)]


@contextmanager
def tapped(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Give a dictionary that holds the named modules' outputs after every forward pass; the hooks go on exit.

    They are copies: an activation behind a module, or a sum, may change its output in place.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.__setitem__(name, output.clone())

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Losses:
    """Which losses a training minimises, one step on each for every batch.

    Attributes:
        network: whether the network is trained with the heads; else only they are, on its features in eval mode.
        weights: one for each head and, with ``network``, one for the network's own loss.
        divisor: of the learning rate.
    """

    network: bool
    weights: tuple[float, ...]
    divisor: float = 1.0

    @staticmethod
    def alone(heads: Heads) -> Losses:
        """The heads alone, on frozen features."""
        return Losses(False, (1.0,) * len(heads.ends))

    @staticmethod
    def equal(heads: Heads) -> Losses:
        """Every head's loss and the network's, each counting as much, as in the paper's Algorithm S1."""
        return Losses(True, (1.0,) * (len(heads.ends) + 1))

    @staticmethod
    def by_depth(segments: Sequence[Segment]) -> Losses:
        """All losses: ``max(0.01, depth^2)``, and the learning rate divided by their sum, as in the authors' code."""
        weights = [max(0.01, segment.depth**2) for segment in segments if segment.end] + [1.0]
        return Losses(True, tuple(weights), sum(weights))


def train_heads(
    model: nn.Module,
    heads: Heads,
    batches: Callable[[int], Iterable[Batch]],
    steps: int,
    config: TrainingConfig,
    losses: Losses,
    *,
    images: int = 0,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Train heads, with their network or alone, in place; afterwards both are in eval mode.

    For every batch there is one forward pass. The gradient of each loss is taken at these weights, and the optimiser
    takes a step on each in turn: on the heads' from the image on, then on the network's own.

    Args:
        model: the network.
        heads: its heads.
        batches: gives the batches of an epoch, counted from 0: images ``(b, ...)`` and labels ``(b,)``.
        steps: batches in an epoch.
        config: the run.
        losses: which, and how much each counts.
        images: how many an epoch has, for the checkpoint.
        checkpoint: a folder that takes the weights after every epoch, and from which an interrupted run goes on.
        progress: shows a bar.

    Raises:
        TrainingError: if the checkpoint belongs to another run, an epoch has no batches, or a loss is not finite.
        ModelError: if the model gives no logits for the labels.

    Source: arXiv 1810.11809, Algorithm S1.
    """
    trained = nn.ModuleDict({"heads": heads, **({"network": model} if losses.network else {})})
    precision = choose_precision(config.precision, next(model.parameters()).device)
    config = replace(config, precision="bfloat16" if precision.bfloat16 else "float32")
    parameters = [p for p in trained.parameters() if p.requires_grad]
    if not parameters:
        return
    optimizer = torch.optim.SGD(
        parameters, config.learning_rate, config.momentum, 0.0, config.weight_decay, config.nesterov
    )
    done = _restore(checkpoint, trained, config, images, optimizer)
    model.eval()
    set_memory_format(model, precision.memory_format)
    try:
        todo = (config.epochs - len(done)) * steps
        with torch.random.fork_rng(), (progress or NoProgress()).task("heads", todo) as advance:
            for epoch in range(len(done), config.epochs):
                trained.train()
                torch.manual_seed(config.seed + epoch)  # for dropout
                total, rate = 0.0, None
                for step, (inputs, labels) in enumerate(batches(epoch)):
                    with precision.autocast():
                        found = _losses(
                            model, heads, precision.place(inputs), labels.to(precision.device), losses
                        )
                    total += _checked(found, epoch)
                    rate = learning_rate_at(config, epoch * steps + step, steps) / losses.divisor
                    _step_on_each(found, losses.weights, parameters, optimizer, rate)
                    advance(1, epoch=epoch + 1, loss=total / (step + 1))
                if rate is None:
                    raise TrainingError(f"epoch {epoch + 1} has no batches; give them anew for every epoch")
                done.append(EpochRecord(epoch + 1, total / steps, 0.0, None, rate, 0.0))
                _save(checkpoint, trained, config, images, optimizer, done)
    finally:
        set_memory_format(model, torch.contiguous_format)
        trained.eval()
        model.zero_grad(set_to_none=True)


def _losses(model: nn.Module, heads: Heads, inputs: Tensor, labels: Tensor, losses: Losses) -> list[Tensor]:
    with tapped(model, heads.ends) as features, torch.set_grad_enabled(losses.network):
        output = check_logits(model(inputs), labels)
    logits = heads.logits(
        {end: feature.detach() if not losses.network else feature for end, feature in features.items()}
    )
    return [
        functional.cross_entropy(x.float(), labels) for x in (*logits, *([output] if losses.network else []))
    ]


def _step_on_each(
    found: Sequence[Tensor],
    weights: Sequence[float],
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    rate: float,
) -> None:
    gradients = [
        torch.autograd.grad(loss * weight, parameters, retain_graph=True, allow_unused=True)
        for loss, weight in zip(found, weights, strict=True)
    ]
    for group in optimizer.param_groups:
        group["lr"] = rate
    for of_one in gradients:
        for parameter, gradient in zip(parameters, of_one, strict=True):
            parameter.grad = gradient
        optimizer.step()
    optimizer.zero_grad()


def _checked(found: Sequence[Tensor], epoch: int) -> float:
    total = float(sum(loss.detach() for loss in found))
    if not torch.isfinite(torch.tensor(total)):
        raise TrainingError(f"a loss of the heads is {total} in epoch {epoch + 1}; lower the learning rate")
    return total


def _restore(
    checkpoint: Path | None,
    trained: nn.Module,
    config: TrainingConfig,
    images: int,
    optimizer: torch.optim.Optimizer,
) -> list[EpochRecord]:
    saved = load_checkpoint(checkpoint) if checkpoint else None
    if saved is None:
        return []
    check_resumable(saved, config, trained, images, regularized=False)
    trained.load_state_dict(saved.weights)
    named = dict(trained.named_parameters())
    for name, momentum in saved.momentum.items():
        optimizer.state[named[name]]["momentum_buffer"] = torch.empty_like(named[name]).copy_(momentum)
    return list(saved.history)


def _save(
    checkpoint: Path | None,
    trained: nn.Module,
    config: TrainingConfig,
    images: int,
    optimizer: torch.optim.Optimizer,
    done: Sequence[EpochRecord],
) -> None:
    if checkpoint is None:
        return
    buffers = {
        name: optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in trained.named_parameters()
        if optimizer.state.get(parameter, {}).get("momentum_buffer") is not None
    }
    save_checkpoint(
        checkpoint,
        Checkpoint(
            trained.state_dict(), buffers, config, describe_parameters(trained), images, tuple(done), None
        ),
    )


def frozen_copy(module: nn.Module) -> Any:
    """Return a copy in float32 and eval mode whose parameters take no gradient."""
    return copy.deepcopy(module).float().eval().requires_grad_(False)
