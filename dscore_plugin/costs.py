"""What networks and plans cost in MACs and parameters; plans from an analytic table, without touching the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dscore_plugin.arguments import as_arguments
from dscore_plugin.groups import ChannelGroup, Role
from dscore_plugin.loading import load_object

_COUNTER = "dscore_plugin.integrations.torch_pruning.counting:count"


def count(model: nn.Module, example_inputs: Any) -> tuple[int, int]:
    """Count the MACs of one image and the parameters, as Torch-Pruning counts them.

    Convolutions and linear layers are multiply-accumulates (their biases too); norms, activations and
    poolings that are modules add one or two for each element. Subclasses of a convolution or a linear layer,
    which Torch-Pruning's counter looks past, are counted as what they are.

    Args:
        model: any network; it works on a copy, so neither its mode nor its statistics change.
        example_inputs: a tensor of shape ``(B, C, H, W)``, or a tuple of inputs, on the model's device.

    Returns:
        MACs of one image, and parameters.
    """
    inputs = as_arguments(example_inputs)
    macs, params = load_object(_COUNTER)(model, inputs)
    return macs, params


@dataclass(frozen=True)
class Cost:
    """MACs of one image, and parameters."""

    macs: float = 0.0
    params: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.params + other.params)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.macs - other.macs, self.params - other.params)

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.macs * factor, self.params * factor)


@dataclass(frozen=True)
class CostTerm:
    """The cost of one layer, split by the dimensions it is proportional to.

    Attributes:
        module: qualified name.
        call: how often the module had been called before (layers without weights may be shared).
        weight: cost proportional to output times input channels.
        channel: cost proportional to output channels alone: a bias, a norm, an activation, a depthwise filter.
    """

    module: str
    call: int
    weight: Cost
    channel: Cost

    @property
    def total(self) -> Cost:
        """The cost before pruning."""
        return self.weight + self.channel


Side = tuple[str, int, str]  # module, call, "in" or "out"


class CostTable:
    """MACs and parameters of a network as a function of how many units every group has lost.

    Args:
        terms: one for each layer (for each call of a layer without weights) that costs something.
        groups: which units take which channels with them.
        fixed: what the terms do not cover; pruning does not change it.
    """

    def __init__(self, terms: Sequence[CostTerm], groups: Sequence[ChannelGroup], fixed: Cost = Cost()):  # noqa: B008
        self._terms = {(term.module, term.call): term for term in terms}
        self._fixed = fixed
        # the share of its channels that each layer loses with one unit of a group
        self._share: dict[str, dict[Side, float]] = {}
        for group in groups:
            share = self._share.setdefault(group.name, {})
            for member in group.members:
                side = (member.module, member.call, "in" if member.role is Role.CONSUMER else "out")
                share[side] = share.get(side, 0.0) + len(member.index) / group.units / member.width
        self.dense = self.cost({})

    def cost(self, removed: Mapping[str, int]) -> Cost:
        """Return the cost with ``removed[group name]`` units taken out of each group named."""
        lost = self._lost(removed)
        return sum((self._left(key, lost) for key in self._terms), self._fixed)

    def saving(self, removed: Mapping[str, int], name: str, units: int = 1) -> Cost:
        """Return what ``units`` more out of group ``name`` save, beyond what is ``removed`` already."""
        before, after = self._lost(removed), self._lost({**removed, name: removed.get(name, 0) + units})
        keys = {(module, call) for module, call, _ in self._share[name]} & self._terms.keys()
        return sum((self._left(key, before) - self._left(key, after) for key in keys), Cost())

    def _lost(self, removed: Mapping[str, int]) -> dict[Side, float]:
        lost: dict[Side, float] = {}
        for name, count in removed.items():
            for side, share in self._share[name].items():
                lost[side] = lost.get(side, 0.0) + share * count
        return lost

    def _left(self, key: tuple[str, int], lost: Mapping[Side, float]) -> Cost:
        term, (module, call) = self._terms[key], key
        out = 1 - lost.get((module, call, "out"), 0.0)
        inner = 1 - lost.get((module, call, "in"), 0.0)
        return term.weight * (out * inner) + term.channel * out
