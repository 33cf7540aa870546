"""What one forward pass did to its tensors: autograd's record, with every layer as a single operation."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch_pruning import ops

# The layers that DepGraph prunes as a whole; what happens inside them is not looked at.
LAYERS = (
    ops.TORCH_CONV,
    ops.TORCH_LINEAR,
    ops.TORCH_BATCHNORM,
    ops.TORCH_LAYERNORM,
    ops.TORCH_GROUPNORM,
    ops.TORCH_INSTANCENORM,
    ops.TORCH_PRELU,
    ops.TORCH_EMBED,
    ops.TORCH_MHA,
    ops.TORCH_LSTM,
)
Value = tuple[Any, int]  # a tensor: the autograd node that made it, and which of its outputs it is


@dataclass(eq=False)
class Operation:
    """One step of the forward pass.

    Attributes:
        fn: autograd's node.
        name: what it does: ``"add"``, ``"view"``; the class's name for a layer.
        module: the layer, or the bare parameter that enters here; None for everything else.
        inputs: the tensors it reads, None where no gradient flows.
        ins: their shapes.
        outs: the shapes of what it gives.
    """

    fn: Any
    name: str
    module: Any
    inputs: list[Value | None]
    ins: list[tuple[int, ...] | None]
    outs: list[tuple[int, ...]]

    def saved(self, name: str) -> Any:
        """Return what autograd kept of the call, such as ``dim``; numbers below zero come out as such."""
        return _signed(getattr(self.fn, f"_saved_{name}"))

    def axis(self, name: str, ndim: int) -> int:
        """Return a dimension that autograd kept, counted from the front."""
        dim = int(self.saved(name))
        return dim + ndim if dim < 0 else dim


@dataclass
class Trace:
    """The operations of one forward pass.

    Attributes:
        operations: by autograd's node, from the outputs backwards.
        readers: for each tensor, who reads it, and as which input.
        calls: the operations of each layer, and of each bare parameter.
        outputs: what the network gives.
    """

    operations: dict[Any, Operation] = field(default_factory=dict)
    readers: dict[Value, list[tuple[Operation, int]]] = field(default_factory=dict)
    calls: dict[Any, list[Operation]] = field(default_factory=dict)
    outputs: list[Value] = field(default_factory=list)
    _spans: list[tuple[int, int, nn.Module]] = field(default_factory=list)

    def owners(self, operation: Operation) -> Iterator[nn.Module]:
        """Name the modules in whose ``forward`` an operation took place, the innermost first."""
        number = operation.fn._sequence_nr()
        for _, end, module in reversed(self._spans[: bisect_right(self._spans, number, key=lambda s: s[0])]):
            if number < end:
                yield module


def trace(model: nn.Module, example_inputs: Any, is_layer: Callable[[nn.Module], bool]) -> Trace:
    """Run a network once and read what autograd recorded.

    Args:
        model: a network in eval mode whose parameters all require gradients.
        example_inputs: the arguments of one forward pass, as a tuple, or as a dict of keywords.
        is_layer: which modules are single operations.

    Returns:
        The operations that lie between parameters and outputs.
    """
    found = Trace()
    with _watched(model, found, is_layer) as layers:
        out = model(**example_inputs) if isinstance(example_inputs, dict) else model(*example_inputs)
    found._spans.sort(key=lambda span: span[0])
    leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    found.outputs = [(leaf.grad_fn, leaf.output_nr) for leaf in leaves]
    waiting = [fn for fn, _ in found.outputs]
    while waiting:
        fn = waiting.pop()
        if fn in found.operations:
            continue
        operation = found.operations[fn] = layers.get(fn) or _operation(fn)
        if operation.module is not None:
            found.calls.setdefault(operation.module, []).append(operation)
        for slot, value in enumerate(operation.inputs):
            if value is not None:
                found.readers.setdefault(value, []).append((operation, slot))
                waiting.append(value[0])
    return found


@contextmanager
def _watched(
    model: nn.Module, found: Trace, is_layer: Callable[[nn.Module], bool]
) -> Iterator[dict[Any, Operation]]:
    """Note each layer's calls as single operations, and between which of autograd's numbers each module ran."""
    layers: dict[Any, Operation] = {}
    single = {module for module in model.modules() if is_layer(module)}
    entered: list[tuple[int, list[tuple[Value | None, tuple[int, ...]]]]] = []

    def enter(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        read = (*inputs, *options.values()) if module in single else ()
        entered.append((_next_number(), [_value(x) for x in read if isinstance(x, Tensor)]))

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        start, noted = entered.pop()
        found._spans.append((start, _next_number(), module))
        first = output[0] if isinstance(output, tuple) else output
        if module in single and isinstance(first, Tensor) and first.grad_fn is not None:
            values = [value for value, _ in noted]
            shapes: list[tuple[int, ...] | None] = [shape for _, shape in noted]
            layers[first.grad_fn] = Operation(
                first.grad_fn, type(module).__name__, module, values, shapes, [tuple(first.shape)]
            )

    handles = []
    for module in model.modules():
        handles += [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave),
        ]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def _value(x: Tensor) -> tuple[Value | None, tuple[int, ...]]:
    if x.grad_fn is None and x.requires_grad:  # a bare parameter
        return (x.view_as(x).grad_fn.next_functions[0][0], 0), tuple(x.shape)  # type: ignore[union-attr]
    return (None if x.grad_fn is None else (x.grad_fn, x.output_nr)), tuple(x.shape)


def _next_number() -> int:
    return int(torch.ones((), requires_grad=True).mul(1).grad_fn._sequence_nr())  # type: ignore[union-attr]


def _operation(fn: Any) -> Operation:
    name = fn.name().rpartition("::")[2].rstrip("0123456789").removesuffix("Backward").lower()
    if name == "accumulategrad":
        return Operation(fn, "parameter", fn.variable, [], [], [tuple(fn.variable.shape)])
    inputs: list[Value | None] = [None if f is None else (f, nr) for f, nr in fn.next_functions]
    ins = [None if value is None else _shape(*value) for value in inputs]
    return Operation(fn, name, None, inputs, ins, [tuple(m.shape) for m in fn._input_metadata])


def _shape(fn: Any, nr: int) -> tuple[int, ...]:
    return tuple(fn.variable.shape if hasattr(fn, "variable") else fn._input_metadata[nr].shape)


def _signed(value: Any) -> Any:
    """Torch shows dimensions below zero as unsigned numbers."""
    if isinstance(value, tuple):
        return tuple(_signed(one) for one in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value - 2**64 if value >= 2**63 else value
    return value
