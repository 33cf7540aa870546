"""DepGraph with channels followed dimension by dimension, instead of by their number alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Number
from typing import Any

import numpy as np
from torch import nn
from torch_pruning import ops
from torch_pruning._helpers import GroupItem
from torch_pruning.dependency import DependencyGraph, Group
from torch_pruning.dependency.dependency import Dependency
from torch_pruning.dependency.node import Node

from dscore_plugin.integrations.torch_pruning.counting import shares_one_weight
from dscore_plugin.integrations.torch_pruning.mapping import (
    SPREAD,
    BarrierError,
    Labels,
    Place,
    Reached,
    follow,
)
from dscore_plugin.integrations.torch_pruning.pruners import (
    ChannelwisePruner,
    GroupNormPruner,
    LayerNormPruner,
)
from dscore_plugin.integrations.torch_pruning.tracing import LAYERS, Operation, Trace, trace

_SAME_ENDS = (  # what goes in comes out: pruned on both sides at once
    ops.TORCH_BATCHNORM,
    ops.TORCH_LAYERNORM,
    ops.TORCH_GROUPNORM,
    ops.TORCH_INSTANCENORM,
    ops.TORCH_PRELU,
)
_CUTTING = ("split", "view", "unsafeview")
_OPAQUE = (ops.TORCH_MHA, ops.TORCH_LSTM)
Spot = tuple[Any, Any, int]  # (autograd's node, output, dim) of a tensor; (layer, "in" | "out" | "both", 0)
Asks = Callable[[nn.Module], bool]


def _nothing(module: nn.Module) -> Any:
    return None


@dataclass(frozen=True)
class Permissions:
    """Which modules' code adapts to the width it finds where it cuts channels up.

    Attributes:
        splits: it cuts into equal parts (``chunk``), so that every part can lose the same channels.
        folds: it divides by a fixed number of groups, so that every one can lose the same channels.
        layers: gives the pruner of a layer that DepGraph does not know and that gives out the channels it reads.
    """

    splits: Asks = _nothing
    folds: Asks = _nothing
    layers: Callable[[nn.Module], ChannelwisePruner | None] = _nothing


class ExactGroup(Group):
    """A group, and what its flow says of it.

    Attributes:
        problem: why it must not be pruned, or an empty string.
        is_output: whether the network gives out its channels.
        tie: for each channel of the root, the lowest channel that it cannot leave without.
    """

    problem: str = ""
    is_output: bool = False
    tie: Labels


@dataclass
class _Flow:
    """Where the channels of one root layer go.

    Attributes:
        tie: for each channel of the root, the lowest that leaves with it.
        labels: for each spot they reach, the root's channel at each position, or -1; in the order of reaching.
        problem: why they must stay; the first reason found.
        is_output: whether the network gives them out.
    """

    tie: Labels
    labels: dict[Spot, Labels] = field(default_factory=dict)
    problem: str = ""
    is_output: bool = False

    def put(self, spot: Spot, new: Labels) -> bool:
        """Add what has reached a spot; say whether that is news."""
        old = self.labels.get(spot)
        if old is None:
            if (new >= 0).any():
                self.labels[spot] = new
            return spot in self.labels
        if len(old) != len(new):
            self.problem = self.problem or "its channels meet others of another number"
            return False
        both, fresh = (old >= 0) & (new >= 0), (old < 0) & (new >= 0)
        self._unite(old[both], new[both])
        if fresh.any():
            self.labels[spot] = np.where(fresh, new, old)
        return bool(fresh.any())

    def _unite(self, some: Labels, others: Labels) -> None:
        apart = self.tie[some] != self.tie[others]
        for one, other in zip(some[apart], others[apart], strict=True):
            low, high = sorted((self.tie[one], self.tie[other]))
            if low != high:
                self.tie[self.tie == high] = low


class ChannelGraph(DependencyGraph):
    """A dependency graph whose groups are exact, and fast where DepGraph's index lists explode.

    ``get_pruning_group`` and ``get_all_groups`` give groups as DepGraph does, for importance classes and pruning
    functions to work on. Indices count in the network as it was traced: build a new graph after pruning.

    Args:
        permissions: what the code of some modules allows.
    """

    def __init__(self, permissions: Permissions | None = None) -> None:
        super().__init__()
        own: dict[Any, Any] = {ops.OPTYPE.GN: GroupNormPruner(), ops.OPTYPE.LN: LayerNormPruner()}
        self.REGISTERED_PRUNERS.update(own)
        self._in_channel_pruning_fn |= {pruner.prune_in_channels for pruner in own.values()}
        self._out_channel_pruning_fn |= {pruner.prune_out_channels for pruner in own.values()}
        self.permissions = permissions or Permissions()
        self.layers: dict[nn.Module, ChannelwisePruner] = {}
        self.record = Trace()
        self._nodes: dict[Any, Node] = {}
        self._flows: dict[Any, _Flow] = {}

    def build_dependency(self, model: nn.Module, *arguments: Any, **options: Any) -> ChannelGraph:
        """Trace a network; the arguments are DepGraph's."""
        self.layers = {
            m: pruner for m in model.modules() if (pruner := self.permissions.layers(m)) is not None
        }
        self._in_channel_pruning_fn |= {pruner.prune_in_channels for pruner in self.layers.values()}
        self._out_channel_pruning_fn |= {pruner.prune_out_channels for pruner in self.layers.values()}
        graph: ChannelGraph = super().build_dependency(model, *arguments, **options)
        return graph

    def get_pruner_of_module(self, module: Any) -> Any:
        """Return what prunes a layer or parameter."""
        return self.layers.get(module) or super().get_pruner_of_module(module)

    def get_pruning_group(
        self, module: nn.Module, pruning_fn: Callable[..., Any], idxs: Sequence[int]
    ) -> ExactGroup:
        """Return what leaves with some output channels of a layer.

        Args:
            module: a convolution or linear layer of the traced network.
            pruning_fn: its pruner's ``prune_out_channels``.
            idxs: channels, counted as when the network was traced.

        Raises:
            ValueError: if the layer was not traced.
        """
        if module not in self.module2node:
            raise ValueError(f"{module} is not in the dependency graph")
        if module not in self._flows:
            self._flows[module] = self._follow(module)
        flow = self._flows[module]
        chosen = np.asarray([idxs] if isinstance(idxs, Number) else list(idxs), np.int64)
        rank = np.full(len(flow.tie), -1, np.int64)
        rank[chosen] = np.arange(len(chosen))
        tied = np.isin(flow.tie, flow.tie[chosen]) & (rank < 0)
        rank[tied] = len(chosen) + np.arange(tied.sum())
        return self._group(flow, rank)

    def parameter_name(self, node: Node) -> str:
        """Return the qualified name of a bare parameter."""
        return str(node._name)

    def _group(self, flow: _Flow, rank: Labels) -> ExactGroup:
        """Make the group of the root's channels that have a rank, in the order of their ranks."""
        group = ExactGroup()
        group._DG, group.problem, group.is_output, group.tie = self, flow.problem, flow.is_output, flow.tie
        seen = set()
        for spot, labels in flow.labels.items():
            node, handler = self._target(spot)
            if node is None or (node, handler) in seen:
                if node is not None and node.type == ops.OPTYPE.PARAMETER:
                    group.problem = group.problem or f"{node._name!r} has its channels along two dimensions"
                continue
            seen.add((node, handler))
            positions = np.flatnonzero((labels >= 0) & (rank[labels] >= 0))
            positions = positions[np.argsort(rank[labels[positions]], kind="stable")]
            if len(positions):
                item = GroupItem(Dependency(handler, handler, node, node), positions.tolist())
                item.root_idxs, item.width, item.dim = labels[positions].tolist(), len(labels), spot[2]
                group._group.append(item)
        return group

    def _target(self, spot: Spot) -> tuple[Node | None, Any]:
        """Return the node that a spot belongs to, and the function that prunes it there."""
        owner, end, dim = spot
        if isinstance(owner, nn.Module):
            pruner = self.get_pruner_of_module(owner)
            handler = pruner.prune_in_channels if end == "in" else pruner.prune_out_channels
            return self.module2node[owner], handler
        operation = self.record.operations[owner]
        is_layer = isinstance(operation.module, nn.Module) and not _passes(operation.module)
        node = None if is_layer else self._nodes.get(owner)
        if node is None:
            return None, None
        if node.type == ops.OPTYPE.PARAMETER:
            node.pruning_dim = dim
        return node, self.get_pruner_of_module(node.module).prune_out_channels

    def _detect_unwrapped_parameters(self, given: Any) -> Any:
        names, bare = super()._detect_unwrapped_parameters(given)
        wrapped = {p for layer in self.layers for p in layer.parameters(recurse=False)}
        return {p: n for p, n in names.items() if p not in wrapped}, [b for b in bare if b[0] not in wrapped]

    # --- tracing: nodes for layers, bare parameters and everything in between ---

    def _trace(self, model: nn.Module, example_inputs: Any, *_: Any, **__: Any) -> dict[Any, Node]:
        model.eval()
        self.record = trace(model, example_inputs, lambda m: isinstance(m, LAYERS) or m in self.layers)
        nodes: dict[Any, Node] = {}
        for fn, operation in self.record.operations.items():
            target = self._node(nodes, operation)
            self._nodes[fn] = target
            for value in operation.inputs:
                if value is not None and target is not None:
                    source = self._node(nodes, self.record.operations[value[0]])
                    if source is not None and source not in target.inputs:
                        target.add_input(source)
                        source.add_output(target)
        return nodes

    def _node(self, nodes: dict[Any, Node], operation: Operation) -> Node | None:
        known = self._nodes.get(operation.fn) or nodes.get(operation.module)
        if known is not None or (
            operation.name == "parameter" and operation.module not in self._param_to_name
        ):
            return known
        module, name = operation.module, self._module2name.get(operation.module)
        if operation.name == "parameter":
            name = self._module2name[module] = self._param_to_name[module]
        elif module is None:
            module = ops._ElementWiseOp(self._op_id, operation.name)
            self._op_id += 1
        node = self._nodes[operation.fn] = nodes[module] = Node(module, operation.fn, name)
        if module in self.layers:
            node.type = ops.OPTYPE.CUSTOMIZED
        return node

    # --- following the channels of a layer ---

    def _follow(self, module: nn.Module) -> _Flow:
        width = self.get_pruner_of_module(module).get_out_channels(module)
        flow = _Flow(np.arange(width))
        start = self._end(module, "out")
        flow.put(start, np.arange(width))
        waiting = deque([start])
        while waiting:
            spot = waiting.popleft()
            for reached, labels in self._neighbours(spot, flow):
                if flow.put(reached, labels):
                    waiting.append(reached)
        return flow

    def _neighbours(self, spot: Spot, flow: _Flow) -> Iterator[tuple[Spot, Labels]]:
        owner, end, dim = spot
        labels = flow.labels[spot]
        if isinstance(owner, nn.Module):
            yield from ((tensor, labels) for tensor in self._tensors_at(owner, end))
            return
        flow.is_output |= (owner, end) in self.record.outputs
        maker = self.record.operations[owner]
        yield from self._pass(flow, maker, Place(True, end, dim, labels))
        for reader, slot in self.record.readers.get((owner, end), ()):
            yield from self._pass(flow, reader, Place(False, slot, dim, labels))

    def _tensors_at(self, layer: nn.Module, end: str) -> Iterator[Spot]:
        for call in self.record.calls[layer]:
            if end != "in":
                yield call.fn, 0, self._channel_dim(layer, call.outs[0])
            if end != "out" and call.inputs and call.inputs[0] is not None:
                yield *call.inputs[0], self._channel_dim(layer, call.ins[0])

    def _pass(self, flow: _Flow, operation: Operation, place: Place) -> Iterator[tuple[Spot, Labels]]:
        """Follow channels through an operation, up to where it stops them."""
        try:
            if operation.name == "parameter":
                self._check_parameter(operation)
            elif operation.module is not None:
                yield from self._through_layer(operation, place)
            else:
                yield from self._through(flow, operation, place)
        except BarrierError as barrier:
            owner = next((self._module2name.get(m) for m in self.record.owners(operation)), None)
            flow.problem = flow.problem or str(barrier) + (f", in {owner!r}" if owner else "")

    def _through(self, flow: _Flow, operation: Operation, place: Place) -> Iterator[tuple[Spot, Labels]]:
        owner = next(self.record.owners(operation), None) if operation.name in _CUTTING else None
        if owner is not None:
            place = replace(
                place, may_split=self.permissions.splits(owner), may_fold=self.permissions.folds(owner)
            )
        try:
            yield from self._spots(operation, follow(operation, place))
        except BarrierError as barrier:
            if str(barrier) != SPREAD or (flow.tie == np.arange(len(flow.tie))).all():
                raise
            tied = np.where(place.labels < 0, -1, flow.tie[place.labels])
            yield from self._spots(operation, follow(operation, replace(place, labels=tied)))

    def _spots(self, operation: Operation, reached: Reached) -> Iterator[tuple[Spot, Labels]]:
        for is_output, slot, dim, labels in reached:
            value = (operation.fn, slot) if is_output else operation.inputs[slot]
            if value is not None:
                yield (*value, dim), labels

    def _check_parameter(self, operation: Operation) -> None:
        if operation.module not in self._param_to_name:
            raise BarrierError("its channels meet a weight that another layer owns")

    def _through_layer(self, operation: Operation, place: Place) -> Iterator[tuple[Spot, Labels]]:
        layer, shape = (
            operation.module,
            operation.outs[0] if place.is_output else operation.ins[place.slot] or (),
        )
        if isinstance(layer, _OPAQUE):
            raise BarrierError(
                f"what leaves a {type(layer).__name__} with its channels cannot be masked or counted"
            )
        if place.dim == self._channel_dim(layer, shape) and not _passes(layer):
            yield self._end(layer, "out" if place.is_output else "in"), place.labels
        elif isinstance(layer, nn.LayerNorm) and place.dim >= len(shape) - len(layer.normalized_shape):
            raise BarrierError("a layer norm over several dimensions does not say which of them are channels")
        elif _passes(layer) or isinstance(layer, nn.Linear | nn.LayerNorm):  # they leave this dimension alone
            value = operation.inputs[0] if place.is_output else (operation.fn, 0)
            if value is not None:
                yield (*value, place.dim), place.labels
        elif place.dim:
            raise BarrierError(f"its channels lie along a dimension that a {type(layer).__name__} mixes")

    def _end(self, layer: nn.Module, end: str) -> Spot:
        same = isinstance(layer, _SAME_ENDS) or layer in self.layers
        same = same or ops.module2type(layer) == ops.OPTYPE.DEPTHWISE_CONV
        return layer, "both" if same else end, 0

    def _channel_dim(self, layer: nn.Module, shape: Any) -> int:
        if layer in self.layers:
            return self.layers[layer].dim % len(shape)
        return channel_dim(layer, shape)


def _passes(layer: nn.Module) -> bool:
    """Whether a layer does the same to every channel, however many there are."""
    return shares_one_weight(layer)


def channel_dim(layer: nn.Module, shape: Any) -> int:
    """Return the dimension of a layer's input or output that holds its channels."""
    if isinstance(layer, nn.Linear | nn.Embedding):
        return len(shape) - 1
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1:
        return -1
    if isinstance(layer, nn.LayerNorm):
        # timm's and torchvision's LayerNorm2d normalise over dim 1, which may be as long as the last one
        width = layer.normalized_shape[-1]
        first = shape[-1] != width or (len(shape) == 4 and "2d" in type(layer).__name__)
        return 1 if first else len(shape) - 1
    return 1
