"""ChannelGroup: which channels of which layers must leave a network together.

An adapter fills it (``dscore_plugin.integrations.torch_pruning.graph``); everyone else reads it.

A group counts in *units*: unit ``u`` is everything that leaves when one channel of the root layer leaves. In a
grouped convolution the same position leaves every group of channels at once, so a root of 64 channels in 4 groups
has 16 units of 4 channels each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor


class Role(Enum):
    """What a member of a group loses when a unit leaves."""

    PRODUCER = "producer"  # output channels: a filter of a convolution or a row of a linear layer
    DEPTHWISE = "depthwise"  # a filter that reads and writes its own channel only
    CONSUMER = "consumer"  # input channels
    NORM = "norm"  # scale, shift and statistics
    PARAMETER = "parameter"  # a slice of a bare parameter
    PASSING = "passing"  # nothing of its own: an activation, a pooling


@dataclass(frozen=True)
class Member:
    """One layer's share in a group.

    Attributes:
        module: qualified name of the module (of the parameter, for ``Role.PARAMETER``).
        role: what the layer loses.
        index: positions in the layer's channel dimension, int64, shape ``(k,)``.
        unit: the unit each position belongs to, int64, shape ``(k,)``.
        width: size of the layer's channel dimension before pruning.
        call: how often the module had been called before this use of it (modules without weights may be shared).
    """

    module: str
    role: Role
    index: Tensor
    unit: Tensor
    width: int
    call: int = 0

    def positions(self, units: Tensor) -> Tensor:
        """Return the positions, sorted, that leave this layer with ``units`` (int64, shape ``(m,)``)."""
        return torch.unique(self.index[torch.isin(self.unit, units)])


@dataclass(frozen=True)
class ChannelGroup:
    """What must go together.

    Attributes:
        name: qualified name of the root layer, whose output channels name the units.
        channels: output channels of the root layer before pruning.
        division: channels that leave together with each unit; unit ``u`` is the root's channels
            ``u, u + units, u + 2 units, ...`` (1 unless a member is a grouped layer).
        members: every layer that loses something, the root first.
        protected: why the group must not be pruned, or an empty string.
    """

    name: str
    channels: int
    division: int
    members: tuple[Member, ...]
    protected: str = ""

    @property
    def units(self) -> int:
        """How many units the group has before pruning."""
        return self.channels // self.division

    def roles(self, *roles: Role) -> tuple[Member, ...]:
        """Return the members that have one of ``roles``, in the group's order."""
        return tuple(member for member in self.members if member.role in roles)

    @property
    def is_inner(self) -> bool:
        """Whether one layer alone produces the channels: no residual sum ties several producers together."""
        return len(self.roles(Role.PRODUCER)) <= 1

    def root_channels(self, units: Iterable[int]) -> tuple[int, ...]:
        """Return the root layer's channels, sorted, that ``units`` stand for."""
        return tuple(sorted(u + part * self.units for u in units for part in range(self.division)))

    def units_of(self, channels: Sequence[int]) -> tuple[int, ...]:
        """Return the units, sorted, that the root's ``channels`` make up; raise ValueError if one is incomplete."""
        units = tuple(sorted({c % self.units for c in channels}))
        if self.root_channels(units) != tuple(sorted(channels)):
            raise ValueError(
                f"{self.name!r} loses channels in sets of {self.division}: "
                f"c, c + {self.units}, ... must be listed together"
            )
        return units


def removal_count(ratio: float, width: int) -> int:
    """How many of ``width`` a ratio removes: ``floor(ratio * width + 1e-9)``, everywhere in this project."""
    return int(ratio * width + 1e-9)


@dataclass(frozen=True)
class ScoredGroup:
    """A group and the importance of its units.

    Attributes:
        group: the group.
        scores: one for each unit, float64, shape ``(units,)``; the lowest is pruned first.
    """

    group: ChannelGroup
    scores: Tensor

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The units from the least to the most important; ties go to the lower index."""
        return tuple(torch.argsort(self.scores, stable=True).tolist())

    def limit(self, min_channels: int) -> int:
        """How many units may leave so that the root layer keeps ``min_channels`` channels, and one unit at least."""
        kept = max(1, -(-min_channels // self.group.division))
        return max(0, self.group.units - kept)
