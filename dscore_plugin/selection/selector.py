"""What a criterion that searches is asked, and what it answers.

A selector (registry kind ``selector``) is a class built with the criterion's options. Its one method looks at the
network and at images and returns a :class:`~dscore_plugin.plan.Plan`. What it needs from other rooms, the traced
graph above all, comes with the request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from dscore_plugin.costs import CostTable
from dscore_plugin.datasets import ImageData
from dscore_plugin.groups import ChannelGroup, ScoredGroup
from dscore_plugin.plan import Plan
from dscore_plugin.selection.allocation import Counts
from dscore_plugin.training.progress import Progress


class Graph(Protocol):
    """What a selector may ask of a traced network (:class:`PruningGraph` offers more)."""

    model: nn.Module
    example_inputs: tuple[Any, ...]

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        """The groups that may be pruned, in the network's order."""
        ...

    @property
    def costs(self) -> CostTable:
        """The table of MACs and parameters."""
        ...


@dataclass(frozen=True)
class Request:
    """What a selector is asked for.

    Attributes:
        example_inputs: the arguments of one forward pass, on the model's device.
        granularity: ``"channel"``, ``"kernel"`` or ``"layer"``.
        goal: ``"ratio"`` (share to remove), ``"target_macs"``, ``"target_params"`` (shares to keep) or
            ``"keep_layers"`` (a number of layers).
        amount: its value.
        seed: of everything random.
        work: a folder for checkpoints, or None; what lies there belongs to the same job and may be gone on with.
        progress: shows bars.
        say: takes a line of news now and then.
        trace: turns a network into its graph.
        groups: those of a graph's groups that the user lets leave (``layers``, ignored layers).
        allot: how many units leave each group, every group giving the same share, so that the goal is met
            (channel granularity).
        write: turns scored groups, counts and ``made_by`` into a plan; the lowest scores leave.
    """

    example_inputs: tuple[Any, ...]
    granularity: str
    goal: str
    amount: float
    seed: int
    work: Path | None
    progress: Progress
    say: Callable[[str], None]
    trace: Callable[[nn.Module], Graph]
    groups: Callable[[Graph], Sequence[ChannelGroup]]
    allot: Callable[[Graph, Sequence[ScoredGroup]], Counts]
    write: Callable[[Graph, Sequence[ScoredGroup], Counts, Mapping[str, Any]], Plan]


class Selector(Protocol):
    """A criterion that makes a plan by search."""

    def check(self, granularity: str) -> None:
        """Refuse what can be refused without a network: a granularity, or options that do not go with it.

        Args:
            granularity: ``"channel"``, ``"kernel"`` or ``"layer"``.

        Raises:
            CriterionError: if it cannot be searched with these options.
        """
        ...

    def select(self, model: nn.Module, data: ImageData, request: Request) -> Plan:
        """Choose what leaves ``model``.

        Args:
            model: the network. A selector may train it (its docstring then says so); the plan is made for the
                weights it has afterwards.
            data: images; the test images are not looked at.
            request: goal, granularity and what comes from other rooms.

        Raises:
            DScoreError: on bad input, before the network is touched.
        """
        ...
