"""Discrimination-aware channel pruning as its authors' code does it: from the images on, two passes a channel.

Nothing is kept from one pass to the next. Layers, heads and rates are given; the heads are trained already.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, Tensor]


@dataclass
class Layer:
    """A convolution whose inputs are chosen, and the place and the head that judge it (None: the network's own)."""

    name: str
    end: str = ""
    head: nn.Module | None = None


class StopPassError(Exception):
    """Leaves a pass behind the last module that is looked at."""


def run(model: nn.Module, images: Tensor, names: Sequence[str], stop: bool) -> tuple[dict[str, Tensor], Any]:
    """Return what the named modules give, and the network's output; ``stop`` ends the pass at the last of them."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[name] = output.clone()  # what follows may change it in place
            if stop and name == names[-1]:
                raise StopPassError

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    output = None
    with contextlib.suppress(StopPassError):
        output = model(images)
    for handle in handles:
        handle.remove()
    return seen, output


def joint(original: nn.Module, pruned: nn.Module, layer: Layer, batch: Batch, strength: float) -> Tensor:
    images, labels = batch
    with torch.no_grad():
        target = run(original, images, [layer.name], stop=True)[0][layer.name]
    seen, output = run(
        pruned, images, [layer.name, *([layer.end] if layer.end else [])], stop=bool(layer.end)
    )
    logits = layer.head(seen[layer.end]) if layer.head is not None else output
    return (seen[layer.name] - target).pow(2).mean() + strength * functional.cross_entropy(logits, labels)


def prune_layer(
    original: nn.Module,
    pruned: nn.Module,
    layer: Layer,
    batches: Sequence[Batch],
    *,
    rate: float = 0.5,
    strength: float = 1.0,
    reading: str = "kernels",
    epsilon: float | None = None,
    at_once: int = 1,
) -> list[int]:
    conv: Any = pruned.get_submodule(layer.name)
    conv.weight.requires_grad_(True)
    tuned = conv.weight.detach().clone()
    conv.weight.data.zero_()
    channels = conv.in_channels
    unselected = list(range(channels))
    selected: list[int] = []
    losses: list[float] = []
    kept = channels - math.floor(channels * rate) if epsilon is None else channels
    images = sum(len(labels) for _, labels in batches)
    while len(selected) < kept:
        conv.weight.grad = None
        total = 0.0
        for batch in batches:
            loss = joint(original, pruned, layer, batch, strength) * len(batch[1]) / images
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        if epsilon is not None and selected and abs(losses[-2] - losses[-1]) / losses[0] <= epsilon:
            break
        gradient = conv.weight.grad
        if reading == "kernels":
            scores = gradient.mul(gradient).sum((2, 3)).sqrt().sum(0)
        else:
            scores = gradient.mul(gradient).sum((0, 2, 3)).sqrt()
        ranked = sorted(unselected, key=lambda k: (-float(scores[k]), k))
        for k in ranked[: min(at_once, kept - len(selected))]:
            selected.append(k)
            unselected.remove(k)
            conv.weight.data[:, k] = tuned[:, k]
        optimizer = torch.optim.SGD([conv.weight], lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)
        for batch in batches:
            optimizer.zero_grad()
            joint(original, pruned, layer, batch, strength).backward()
            conv.weight.grad[:, unselected] = 0
            optimizer.step()
    conv.weight.requires_grad_(False)
    return selected


def prune(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch], **options: Any
) -> tuple[dict[str, list[int]], nn.Module]:
    """Return what was selected in each layer, in order, and the network with the other inputs set to zero."""
    original, pruned = (copy.deepcopy(model).eval().requires_grad_(False) for _ in range(2))
    for layer in layers:
        if layer.head is not None:
            layer.head.eval().requires_grad_(False)
    selected = {layer.name: prune_layer(original, pruned, layer, batches, **options) for layer in layers}
    return selected, pruned
