"""How channels pass an operation: from a dimension of one of its tensors to dimensions of the others.

DepGraph follows channel numbers and guesses from their count which dimension they lie in. Here every operation is
followed dimension by dimension, with the shapes and arguments that autograd keeps, so that a token, a window, an
attention head and a channel are never mistaken for one another. What a rule does not know is a barrier: the
channels that meet it stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dscore_plugin.integrations.torch_pruning.tracing import Operation

Labels = NDArray[np.int64]  # for each place along a dimension, the root's channel that it belongs to, or -1
Reached = Iterator[tuple[bool, int, int, Labels]]  # (is it an output?, which, its dimension, labels along it)


class BarrierError(Exception):
    """Channels cannot be followed, or must not be removed; says why."""


@dataclass(frozen=True)
class Place:
    """Where channels meet an operation.

    Attributes:
        is_output: at one of its outputs, not of its inputs.
        slot: which of them.
        dim: along which dimension.
        labels: of every place along the dimension.
        may_split: the code that runs here cuts in equal parts, however wide the tensor is.
        may_fold: the code that runs here divides by a fixed number of heads or groups, however wide the tensor is.
    """

    is_output: bool
    slot: int
    dim: int
    labels: Labels
    may_split: bool = False
    may_fold: bool = False


Rule = Callable[[Operation, Place], Reached]

SPLIT = "its channels are split, at places that pruning would move"
SPREAD = "its channels are spread over several dimensions (a shuffle, attention heads)"
PADDED = "its channels pass through a padding of channels, which cannot be mapped"
PARTLY = "its channels are joined with some of unknown origin, which cannot be mapped"


def follow(operation: Operation, place: Place) -> Reached:
    """Say where channels go, or come from, at the other tensors of an operation.

    Args:
        operation: any but a layer's or a parameter's.
        place: where the channels meet it.

    Yields:
        ``(is_output, slot, dim, labels)`` of every dimension they reach.

    Raises:
        BarrierError: if the operation mixes channels, or is not known.
    """
    rule = RULES.get(operation.name)
    if rule is None:
        raise BarrierError(f"its channels pass {operation.name!r}, an operation without a rule")
    yield from rule(operation, place)


def _elementwise(op: Operation, at: Place) -> Reached:
    """Broadcasting: dimensions are aligned at their end, those of size 1 are repeated."""
    out = op.outs[0]
    dim, labels = at.dim, at.labels
    if not at.is_output:
        shape = op.ins[at.slot]
        assert shape is not None
        dim += len(out) - len(shape)
        if out[dim] == len(labels):
            yield True, 0, dim, labels
        return
    for slot, shape in enumerate(op.ins):
        here = dim - len(out) + len(shape or ())
        if shape is not None and here >= 0 and shape[here] == len(labels):
            yield False, slot, here, labels


def _view(op: Operation, at: Place) -> Reached:
    """Reshape, flatten, squeeze, unsqueeze: decided by the shapes alone."""
    inside = op.ins[0]
    assert inside is not None
    before, after = (op.outs[0], inside) if at.is_output else (inside, op.outs[0])
    for dim, labels in reshaped(before, after, at):
        yield not at.is_output, 0, dim, labels


def _strided(op: Operation, at: Place) -> Reached:
    """Poolings to a single place set strides without changing the shape; anything else is beyond following."""
    if op.ins[0] != op.outs[0]:
        raise BarrierError("its channels pass an arbitrary stride")
    yield not at.is_output, 0, at.dim, at.labels


def reshaped(before: tuple[int, ...], after: tuple[int, ...], at: Place) -> list[tuple[int, Labels]]:
    """Follow one dimension of a row-major tensor into another shape with as many elements.

    Returns:
        The dimension and the labels along it; an empty list if no label is left to follow. Folding a dimension
        into several ties what has the same place in the last.

    Raises:
        BarrierError: if the channels vary along several dimensions of the new shape.
    """
    sizes, start, stop = _factors(before, after, at.dim)
    grid = np.full(sizes[0], -1, np.int64)
    shape = [1] * len(sizes[0])
    shape[at.dim - start[0]] = -1
    grid[:] = at.labels.reshape(shape)
    grid = grid.reshape(sizes[1])
    varying = [
        axis for axis, size in enumerate(sizes[1]) if size > 1 and (grid != grid.take([0], axis)).any()
    ]
    if len(varying) == 1 or grid.size == 1 or not varying:
        axis = varying[0] if varying else next((a for a, s in enumerate(sizes[1]) if s > 1), 0)
        if start[1] + axis >= len(after):
            return []
        line = np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)[:, 0]
        return [(start[1] + axis, line)]
    last = varying[-1]
    if not at.may_fold or start[1] + last != stop[1] - 1:
        raise BarrierError(SPREAD)
    rows = np.moveaxis(grid, last, -1).reshape(-1, grid.shape[last])
    return [(start[1] + last, row) for row in rows]


def _factors(
    before: tuple[int, ...], after: tuple[int, ...], dim: int
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, int], tuple[int, int]]:
    """Cut two shapes into the shortest runs of equal product, and return those that dimension ``dim`` lies in."""
    i = j = 0
    while True:
        first, second, m, n = i, j, before[i], 1
        i += 1
        if j < len(after):
            n, j = after[j], j + 1
        while m != n:
            if m < n:
                m, i = m * before[i], i + 1
            else:
                n, j = n * after[j], j + 1
        if i > dim:
            return (before[first:i], after[second:j]), (first, second), (i, j)


def _permute(op: Operation, at: Place) -> Reached:
    dims = [d % len(op.outs[0]) for d in op.saved("dims")]
    yield not at.is_output, 0, dims[at.dim] if at.is_output else dims.index(at.dim), at.labels


def _transpose(op: Operation, at: Place) -> Reached:
    ndim = len(op.outs[0])
    one, other = (ndim - 2, ndim - 1) if op.name == "t" else (op.axis("dim0", ndim), op.axis("dim1", ndim))
    yield not at.is_output, 0, {one: other, other: one}.get(at.dim, at.dim), at.labels


def _cat(op: Operation, at: Place) -> Reached:
    out = op.outs[0]
    axis = op.axis("dim", len(out))
    if at.dim != axis:
        yield from _same_dim(op, at)
        return
    widths = [0 if shape is None else shape[axis] for shape in op.ins]
    if sum(widths) != out[axis]:
        if sum(shape is None for shape in op.ins) > 1:
            raise BarrierError(PARTLY)
        widths[op.ins.index(None)] = out[axis] - sum(widths)
        raise BarrierError(PARTLY)
    starts = np.cumsum([0, *widths])
    if at.is_output:
        for slot, width in enumerate(widths):
            if op.ins[slot] is not None:
                yield False, slot, axis, at.labels[starts[slot] : starts[slot] + width]
        return
    labels = np.full(out[axis], -1, np.int64)
    labels[starts[at.slot] : starts[at.slot + 1]] = at.labels
    yield True, 0, axis, labels


def _same_dim(op: Operation, at: Place) -> Reached:
    """Every tensor has the channels in the same dimension."""
    for slot, shape in enumerate(op.ins):
        other = shape is not None and (at.is_output or slot != at.slot) and len(shape) > at.dim
        if other and shape[at.dim] == len(at.labels):  # type: ignore[index]
            yield False, slot, at.dim, at.labels
    for slot, shape in enumerate(op.outs):
        if (not at.is_output or slot != at.slot) and shape[at.dim] == len(at.labels):
            yield True, slot, at.dim, at.labels


def _stack(op: Operation, at: Place) -> Reached:
    axis = op.axis("dim", len(op.outs[0]))
    if not at.is_output:
        yield True, 0, at.dim + (at.dim >= axis), at.labels
    elif at.dim == axis:
        raise BarrierError(SPREAD)
    else:
        for slot, shape in enumerate(op.ins):
            if shape is not None:
                yield False, slot, at.dim - (at.dim > axis), at.labels


def _unbind(op: Operation, at: Place) -> Reached:
    ndim = len(op.outs[0]) + 1
    axis = op.axis("dim", ndim)
    if at.is_output:
        yield False, 0, at.dim + (at.dim >= axis), at.labels
    elif at.dim == axis:
        raise BarrierError(SPREAD)
    else:
        for slot in range(len(op.outs)):
            yield True, slot, at.dim - (at.dim > axis), at.labels


def _select(op: Operation, at: Place) -> Reached:
    axis = op.axis("dim", len(op.outs[0]) + 1)
    if at.is_output:
        yield False, 0, at.dim + (at.dim >= axis), at.labels
    elif at.dim == axis:
        raise BarrierError(SPLIT)
    else:
        yield True, 0, at.dim - (at.dim > axis), at.labels


def _split(op: Operation, at: Place) -> Reached:
    axis = op.axis("dim", len(op.outs[0]))
    if at.dim != axis:
        yield from _same_dim(op, at)
        return
    widths = [shape[axis] for shape in op.outs]
    if len(widths) > 1 and not (at.may_split and len(set(widths)) == 1):
        raise BarrierError(SPLIT)
    starts = np.cumsum([0, *widths])
    if at.is_output:
        labels = np.full(starts[-1], -1, np.int64)
        labels[starts[at.slot] : starts[at.slot + 1]] = at.labels
        yield False, 0, axis, labels
        return
    for slot in range(len(widths)):
        yield True, slot, axis, at.labels[starts[slot] : starts[slot + 1]]


def _slice(op: Operation, at: Place) -> Reached:
    ndim = len(op.outs[0])
    axis = op.axis("dim", ndim)
    inside = op.ins[0]
    if at.dim != axis or (inside is not None and inside[axis] == op.outs[0][axis]):
        yield not at.is_output, 0, at.dim, at.labels
    else:
        raise BarrierError(SPLIT)


def _index(op: Operation, at: Place) -> Reached:
    """Advanced indexing: the indexed dimensions, which stand side by side, become those of the index."""
    indices = list(op.saved("indices"))
    chosen = [d for d, index in enumerate(indices) if index is not None]
    if (
        not chosen
        or chosen[-1] - chosen[0] + 1 != len(chosen)
        or any(indices[d].dtype.is_floating_point for d in chosen)
    ):
        raise BarrierError("its channels pass an indexing by several dimensions")
    if any(str(indices[d].dtype) == "torch.bool" for d in chosen):
        raise BarrierError("its channels pass an indexing by a mask")
    inside = op.ins[0]
    assert inside is not None
    grown = len(op.outs[0]) - len(inside)
    first, last = (chosen[0], chosen[-1] + (grown if at.is_output else 0))
    if first <= at.dim <= last:
        raise BarrierError(SPLIT)
    shift = 0 if at.dim < first else (-grown if at.is_output else grown)
    yield not at.is_output, 0, at.dim + shift, at.labels


def _fixed(*names: str) -> Rule:
    """Return the rule of operations that move or mix places along the dimensions they name, and no others."""

    def rule(op: Operation, at: Place) -> Reached:
        ndim = len(op.outs[0])
        moved: set[int] = set()
        for name in names:
            value = op.saved(name)
            moved |= {d % ndim for d in (value if isinstance(value, tuple) else (value,))}
        if at.dim in moved:
            raise BarrierError(f"its channels are mixed by {op.name!r}")
        yield from _same_dim(op, at)

    return rule


def _reduced(op: Operation, at: Place) -> Reached:
    """Sums, means, norms: the dimensions they run over are gone, or of size 1."""
    inside = op.ins[0]
    assert inside is not None
    saved = getattr(op.fn, "_saved_dim", None)
    dims = op.saved("dim") if saved is not None else ()
    over = {d % len(inside) for d in (dims if isinstance(dims, tuple) else (dims,))}
    over = over or set(range(len(inside)))
    kept = [d for d in range(len(inside)) if d not in over]
    keeps_dims = len(op.outs[0]) == len(inside)
    if at.is_output:
        if keeps_dims and at.dim in over:
            return
        yield False, 0, at.dim if keeps_dims else kept[at.dim], at.labels
        return
    if at.dim in over:
        raise BarrierError(f"{op.name!r} runs over its channels")
    yield True, 0, at.dim if keeps_dims else kept.index(at.dim), at.labels


def _spatial(op: Operation, at: Place) -> Reached:
    """Poolings, interpolations and paddings: the batch and the channels stay, the rest is moved."""
    shape = op.outs[0]
    spatial = 3 if "3d" in op.name else 1 if "1d" in op.name else 2
    if at.dim >= len(shape) - spatial:
        raise BarrierError(f"its channels lie along a dimension that {op.name!r} moves")
    yield not at.is_output, 0, at.dim, at.labels


def _pad(op: Operation, at: Place) -> Reached:
    behind = len(op.outs[0]) - 1 - at.dim
    left, right = [*op.saved("pad"), *[0] * 2 * len(op.outs[0])][2 * behind : 2 * behind + 2]
    if at.is_output:
        left, right = -left, -right
    labels = np.pad(at.labels, (max(left, 0), max(right, 0)), constant_values=-1)
    yield not at.is_output, 0, at.dim, labels[max(-left, 0) : len(labels) - max(-right, 0)]
    if left or right:
        raise BarrierError(PADDED)


def _repeat(op: Operation, at: Place) -> Reached:
    repeats, shape = op.saved("repeats"), op.saved("self_sym_sizes")
    more = len(repeats) - len(shape)
    if not at.is_output:
        yield True, 0, at.dim + more, np.tile(at.labels, repeats[at.dim + more])
    elif at.dim >= more:
        for part in np.split(at.labels, repeats[at.dim]):
            yield False, 0, at.dim - more, part


def _unfold(op: Operation, at: Place) -> Reached:
    inside = op.ins[0]
    assert inside is not None
    if at.dim in (op.axis("dimension", len(inside)), len(inside)):
        raise BarrierError(SPREAD)
    yield not at.is_output, 0, at.dim, at.labels


def _matmul(op: Operation, at: Place) -> Reached:
    """``(..., n, k) @ (..., k, m)``: what is summed over cannot be masked."""
    first = 1 if op.name in ("addmm", "baddbmm") else 0
    ndim = len(op.outs[0])
    row, column = ndim - 2, ndim - 1
    if at.is_output:
        if at.dim != column:
            yield False, first, at.dim, at.labels
        if at.dim != row:
            yield False, first + 1, at.dim, at.labels
        bias = op.ins[0] if first else None
        if bias is not None and at.dim >= ndim - len(bias) and bias[at.dim - ndim] == len(at.labels):
            yield False, 0, at.dim - ndim + len(bias), at.labels
    elif first and at.slot == 0:
        yield True, 0, at.dim + ndim - len(op.ins[0] or ()), at.labels
    elif at.dim == (column if at.slot == first else row):
        raise BarrierError("a product of two activations sums over its channels (attention)")
    else:
        yield True, 0, at.dim, at.labels
        if at.dim < row and op.ins[2 * first + 1 - at.slot] is not None:
            yield False, 2 * first + 1 - at.slot, at.dim, at.labels


def _attention(op: Operation, at: Place) -> Reached:
    """Scaled dot products of torch's: q, k ``(..., n, e)``, v ``(..., n, d)`` give ``(..., n, d)``."""
    last = len(op.outs[0]) - 1
    if at.is_output:
        if at.dim == last:
            yield False, 2, at.dim, at.labels
        elif at.dim == last - 1:
            yield False, 0, at.dim, at.labels
        else:
            yield from ((False, slot, at.dim, at.labels) for slot in range(3) if op.ins[slot] is not None)
    elif at.dim == last and at.slot != 2:
        raise BarrierError("a product of two activations sums over its channels (attention)")
    elif at.dim == last or at.dim < last - 1 or at.slot == 0:
        yield True, 0, at.dim, at.labels
    else:
        raise BarrierError("attention runs over its channels")


def _convolution(op: Operation, at: Place) -> Reached:
    """A convolution with weights that are no layer's: only a fixed filter for each channel can be followed."""
    inside = op.ins[0]
    alone = inside is not None and op.saved("groups") == inside[1] == op.outs[0][1] and op.inputs[1] is None
    if at.dim != 1 or at.slot != 0 or not alone:
        raise BarrierError("its channels pass a convolution whose weights are computed")
    yield not at.is_output, 0, 1, at.labels


def _normalised(op: Operation, at: Place) -> Reached:
    """A layer norm without a layer."""
    shape = op.ins[0]
    assert shape is not None
    if at.slot != 0 or at.dim >= len(shape) - len(op.saved("normalized_shape")):
        raise BarrierError(f"{op.name!r} runs over its channels")
    yield not at.is_output, 0, at.dim, at.labels


def _im2col(op: Operation, at: Place) -> Reached:
    size = math.prod(op.saved("kernel_size"))
    if at.dim == 0:
        yield not at.is_output, 0, 0, at.labels
    elif at.dim != 1:
        raise BarrierError(f"its channels lie along a dimension that {op.name!r} moves")
    elif (op.name == "im2col") != at.is_output:
        yield not at.is_output, 0, 1, np.repeat(at.labels, size)
    else:
        for line in at.labels.reshape(-1, size).T:
            yield not at.is_output, 0, 1, line


_ELEMENTWISE = """
add sub rsub mul div neg exp log log2 sqrt rsqrt pow reciprocal abs sigmoid tanh relu gelu silu elu celu selu mish
hardswish hardsigmoid hardtanh leakyrelu softplus logsigmoid threshold clamp clampmin clampmax clone tocopy
copy alias where lerp addcmul addcdiv minimum maximum erf sin cos square sign nativedropout maskedfill expand
log1p expm1 hardshrink softshrink fill floor round ceil expand_as contiguous mulscalar sgn positive xlogy
"""
_REDUCED = "mean sum amax amin max min var std prod linalgvectornorm norm logsumexp"
_VIEWS = "view unsafeview reshapealias unsafereshape squeeze unsqueeze flatten reshape viewas"
_SPATIAL = """
maxpool2dwithindices avgpool2d adaptiveavgpool2d adaptivemaxpool2d maxpool3dwithindices avgpool3d
upsamplebilinear2d upsamplenearest2d upsamplebicubic2d upsamplelinear1d upsamplenearest1d upsamplebilinear2daa
upsamplebicubic2daa reflectionpad1d reflectionpad2d replicationpad1d replicationpad2d mkldnnmaxpool2d
upsamplenearestexact2d adaptiveavgpool3d
"""
RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_VIEWS.split(), _view),
    **dict.fromkeys(_SPATIAL.split(), _spatial),
    **dict.fromkeys(_REDUCED.split(), _reduced),
    **dict.fromkeys(["softmax", "logsoftmax", "cumsum"], _fixed("dim")),
    **dict.fromkeys(["roll", "flip"], _fixed("dims")),
    **dict.fromkeys(["mm", "bmm", "addmm", "baddbmm"], _matmul),
    **dict.fromkeys(["transpose", "t"], _transpose),
    **dict.fromkeys(["nativelayernorm", "fusedrmsnorm", "rmsnorm"], _normalised),
    **dict.fromkeys(["split", "splitwithsizes"], _split),
    **dict.fromkeys(["im2col", "col2im"], _im2col),
    "asstrided": _strided,
    "permute": _permute,
    "cat": _cat,
    "stack": _stack,
    "unbind": _unbind,
    "select": _select,
    "slice": _slice,
    "index": _index,
    "indexselect": _fixed("dim"),
    "gather": _fixed("dim"),
    "repeat": _repeat,
    "unfold": _unfold,
    "constantpadnd": _pad,
    "convolution": _convolution,
    "scaleddotproductflashattentionforcpu": _attention,
    "scaleddotproductflashattention": _attention,
    "scaleddotproductefficientattention": _attention,
    "scaleddotproductcudnnattention": _attention,
    "scaleddotproductfusedattentionoverrideable": _attention,
}
