"""How many units leave each group: families of allocations, from nothing to as much as is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from dscore_plugin.errors import BudgetError
from dscore_plugin.groups import ScoredGroup, removal_count

Counts = dict[str, int]  # group name -> units that leave


class Path(Protocol):
    """A family of allocations: ``at(0)`` removes nothing, and no count falls as ``t`` grows to 1."""

    def at(self, t: float) -> Counts:
        """Return the units that leave each group at ``t`` in ``[0, 1]``."""
        ...


class Limits:
    """What no allocation may do: empty a layer, go below ``min_channels``, or leave an awkward width.

    Args:
        scored: the groups.
        min_channels: channels that every root layer keeps at least (a layer that has fewer keeps all).
        round_to: the channels that remain are a multiple of it; a layer that cannot be is left whole.

    Raises:
        BudgetError: if ``min_channels`` or ``round_to`` is below 1.
    """

    def __init__(self, scored: Sequence[ScoredGroup], min_channels: int = 1, round_to: int | None = None):
        if min_channels < 1 or (round_to is not None and round_to < 1):
            raise BudgetError(
                f"min_channels and round_to must be at least 1, got {min_channels} and {round_to}"
            )
        self._groups = {item.group.name: item for item in scored}
        self._most = {name: item.limit(min_channels) for name, item in self._groups.items()}
        self._step = {
            name: (round_to or 1) // math.gcd(round_to or 1, item.group.division)
            for name, item in self._groups.items()
        }

    def clamp(self, name: str, count: int) -> int:
        """Return the largest allowed count that is at most ``count``."""
        units, step = self._groups[name].group.units, self._step[name]
        kept = units - max(0, min(count, self._most[name]))
        return max(0, units - math.ceil(kept / step) * step)

    def step(self, name: str, count: int, most: int) -> int:
        """Return the smallest allowed count above ``count`` that is at most ``most``, or ``count`` if there is none."""
        return next((c for c in range(count + 1, most + 1) if self.clamp(name, c) == c), count)


class UniformPath:
    """The same share of every group: ``floor(t n)`` units."""

    def __init__(self, scored: Sequence[ScoredGroup], limits: Limits) -> None:
        self._units = {item.group.name: item.group.units for item in scored}
        self._limits = limits

    def at(self, t: float) -> Counts:
        """Return the units that leave each group at ratio ``t``."""
        return {
            name: self._limits.clamp(name, removal_count(t, units)) for name, units in self._units.items()
        }


class GlobalPath:
    """The lowest share ``t`` of all units, by score across groups.

    A group that falls wholly below the threshold is clamped to its limit, not skipped.
    """

    def __init__(self, scored: Sequence[ScoredGroup], limits: Limits) -> None:
        self._names = [item.group.name for item in scored]
        self._limits = limits
        scores = torch.cat([item.scores for item in scored])
        owner = torch.cat([torch.full((item.group.units,), place) for place, item in enumerate(scored)])
        self._owner = owner[torch.argsort(scores, stable=True)]

    def at(self, t: float) -> Counts:
        """Return the units that leave each group when ``floor(t N)`` of all ``N`` lie below the threshold."""
        below = self._owner[: removal_count(t, len(self._owner))]
        counts = torch.bincount(below, minlength=len(self._names)).tolist()
        return {
            name: self._limits.clamp(name, count) for name, count in zip(self._names, counts, strict=True)
        }


def total(counts: Mapping[str, int]) -> int:
    """Return how many units leave in all."""
    return sum(counts.values())
