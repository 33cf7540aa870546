"""Where additional losses stand in a network.

A head reads a feature map, and stands at a *cut*: a place that everything between the image and the output passes
through, the end of a residual block or any layer of a plain network. Cuts are found in the graph that autograd
records, so that this works for any ``forward``.

Source: Zhuang et al., *Discrimination-aware Channel Pruning for Deep Neural Networks*, arXiv 1810.11809; its authors'
code counts the blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dscore_plugin.arguments import as_arguments
from dscore_plugin.errors import CriterionError, ModelError, did_you_mean
from dscore_plugin.modes import in_eval_mode

FEATURE_MAPS = (3, 4, 5)  # dimensions of what a head can read: batch, channels, one to three of positions
_DEEP = (
    24  # layers to choose from, and more: three heads, as the authors gave ResNet-50 and ResNet-56; else two
)


@dataclass(frozen=True)
class Segment:
    """Layers that one loss speaks for.

    Attributes:
        end: qualified name of the module whose output the head reads; empty for the network's own output.
        layers: qualified names, in the order of the network.
        depth: the share of the network's blocks that end here or before, in ``(0, 1]``.
    """

    end: str
    layers: tuple[str, ...]
    depth: float = 1.0


def find_segments(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    layers: Sequence[str],
    heads: int | None = None,
    places: Sequence[str] = (),
) -> tuple[Segment, ...]:
    """Divide a network among its losses: heads at evenly spaced places, and the network's own output.

    Blocks are counted that hold at least one of ``layers``, and the heads stand behind every
    ``blocks // (heads + 1) + 1`` of them, as in the authors' code (ResNet-56, 3 heads: behind blocks 7, 14, 21).

    Args:
        model: gives logits ``(B, classes)``; it is left as it was.
        example_inputs: the arguments of one forward pass, the image first (a tensor stands for one argument).
        layers: qualified names of the layers that channels are chosen for; one that is never called has no segment.
        heads: how many; by default 3 where there are 24 layers or more and else 2, or fewer in shallow networks.
        places: qualified names of the modules whose outputs the heads read, instead of ``heads``.

    Returns:
        The segments in the order of the network, each with at least one layer; the last one has the network's output.

    Raises:
        CriterionError: if a place or the number of heads is impossible.
        ModelError: if the network does not run, or gives no single tensor.
    """
    trace = _Trace(model, as_arguments(example_inputs))
    if places:
        ends = [(trace.end_of(name), name) for name in places]
        return _divide(trace, layers, [(time, name, 0.0) for time, name in sorted(ends)])
    blocks = trace.blocks(layers)
    number = _number_of_heads(len(layers), len(blocks), heads)
    step = len(blocks) // (number + 1) + 1
    if step * number >= len(blocks):  # the authors' rounding leaves no room for the last one
        pivots = [round(i * len(blocks) / (number + 1)) for i in range(1, number + 1)]
    else:
        pivots = [step * i for i in range(1, number + 1)]
    chosen = [(*blocks[pivot - 1], pivot / len(blocks)) for pivot in pivots]
    return _divide(trace, layers, chosen)


def _number_of_heads(layers: int, blocks: int, heads: int | None) -> int:
    most = max(0, blocks - 1)
    if heads is None:
        return min(3 if layers >= _DEEP else 2, most)
    if not 0 <= heads <= most:
        raise CriterionError(
            f"heads={heads} cannot be placed: expected 0 to {most}, as the layers to choose for lie in {blocks} blocks"
        )
    return heads


def _divide(
    trace: _Trace, layers: Sequence[str], ends: Sequence[tuple[int, str, float]]
) -> tuple[Segment, ...]:
    ordered = sorted((name for name in layers if name in trace.calls), key=lambda name: trace.calls[name].end)
    segments, before = [], 0
    for time, name, depth in [*ends, (trace.time + 1, "", 1.0)]:
        inside = tuple(layer for layer in ordered if before < trace.calls[layer].end <= time)
        share = depth or sum(trace.calls[layer].end <= time for layer in ordered) / max(1, len(ordered))
        if inside:
            segments.append(Segment(name, inside, share))
        before = time
    return tuple(segments)


@dataclass
class _Call:
    """The first call of a module: when it began and ended, counted in starts and ends, and what it gave."""

    start: int
    end: int = 0
    shape: tuple[int, ...] = ()
    node: Any = None


class _Trace:
    """One forward pass: every call of a module, and the cuts between them."""

    def __init__(self, model: nn.Module, example_inputs: tuple[Any, ...]) -> None:
        self.calls: dict[str, _Call] = {}
        self.times: Counter[str] = Counter()
        self.time = 0
        self._model = model
        image = example_inputs[0].detach().clone().requires_grad_(True)
        handles = [handle for name, module in model.named_modules() for handle in self._watch(name, module)]
        try:
            with torch.enable_grad(), in_eval_mode(model):
                output = model(image, *example_inputs[1:])
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} does not run on {tuple(image.shape)}: {error}; check the input shape"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(output, Tensor) or output.grad_fn is None:
            raise ModelError(f"expected one tensor of logits, got a {type(output).__name__} from the network")
        self._cuts = _cuts(output.grad_fn, image)

    def _watch(self, name: str, module: nn.Module) -> Iterator[Any]:
        def start(*_: Any) -> None:
            self.time += 1
            self.times[name] += 1
            self.calls.setdefault(name, _Call(self.time))

        def end(module: nn.Module, inputs: Any, output: Any) -> None:
            self.time += 1
            call = self.calls[name]
            if not call.end:
                call.end = self.time
                if isinstance(output, Tensor):
                    call.shape, call.node = tuple(output.shape), output.grad_fn

        yield module.register_forward_pre_hook(start)
        yield module.register_forward_hook(end)

    def end_of(self, name: str) -> int:
        """Return when a module that a head is to read ended; raise CriterionError if no head can stand there."""
        if name not in self.calls:
            hint = did_you_mean(name, self.calls)
            raise CriterionError(f"no head can stand at {name!r}: the network calls no such module{hint}")
        if self.times[name] != 1 or len(self.calls[name].shape) not in FEATURE_MAPS:
            raise CriterionError(
                f"no head can stand at {name!r}: expected a module that is called once and gives (B, C, positions)"
            )
        return self.calls[name].end

    def blocks(self, layers: Sequence[str]) -> list[tuple[int, str]]:
        """Return the ends of the blocks that hold a layer: when each ended, and the module that gave it.

        A block ends at the first cut behind its layers, or at a later one with no convolution in between.
        """
        cuts = self._cut_modules()
        ends = sorted(self.calls[layer].end for layer in layers if layer in self.calls)
        begun = sorted(
            call.start for name, call in self.calls.items() if _has_kernels(self._model.get_submodule(name))
        )
        blocks: dict[int, tuple[int, str]] = {}
        for time, name in cuts:
            held = sum(end <= time for end in ends)
            first = blocks.get(held)
            if held and (first is None or not any(first[0] < start < time for start in begun)):
                blocks[held] = (time, name)
        if ends and len(ends) not in blocks:
            blocks[len(ends)] = (self.time, "")  # the output ends the last one
        return [blocks[held] for held in sorted(blocks)]

    def _cut_modules(self) -> list[tuple[int, str]]:
        """Return, in order, the modules whose outputs everything passes through; of several, the outermost.

        A container that began before the cut in front of it holds more than one block, and does not count.
        """
        at: dict[Any, list[tuple[_Call, str]]] = {}
        for name, call in sorted(self.calls.items(), key=lambda item: item[1].end):
            if call.node in self._cuts and len(call.shape) in FEATURE_MAPS and self.times[name] == 1:
                at.setdefault(call.node, []).append((call, name))
        found, before = [], 0
        for candidates in at.values():
            fitting = [item for item in candidates if item[0].start > before] or candidates[:1]
            call, name = min(fitting, key=lambda item: item[0].start)
            found.append((call.end, name))
            before = max(item[0].end for item in candidates[:1])
        return found


def _has_kernels(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim > 2


def _cuts(output: Any, image: Tensor) -> set[Any]:
    """Return the autograd nodes that every path from the output to the image passes through.

    A node lies on (paths from the output to it) x (paths from it to the image) of all paths.
    """
    order = _topological(output)
    below = {node: 1 for node in order if getattr(node, "variable", None) is image}
    for node in reversed(order):
        if node not in below:
            below[node] = sum(below[child] for child, _ in node.next_functions if child is not None)
    above = dict.fromkeys(order, 0)
    above[output] = 1
    for node in order:
        for child, _ in node.next_functions:
            if child is not None:
                above[child] += above[node]
    return {node for node in order if above[node] * below[node] == below[output] > 0}


def _topological(output: Any) -> list[Any]:
    """Return the nodes behind an output, each before those it was computed from."""
    finished: dict[Any, None] = {}
    seen, waiting = {output}, [(output, iter(output.next_functions))]
    while waiting:
        node, children = waiting[-1]
        child = next((child for child, _ in children if child is not None and child not in seen), None)
        if child is None:
            finished[node] = None
            waiting.pop()
        else:
            seen.add(child)
            waiting.append((child, iter(child.next_functions)))
    return list(reversed(finished))
