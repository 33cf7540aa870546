"""The processes of one launch (``accelerate launch``, ``torchrun``) that divide a list of tasks among themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

from dscore_plugin.errors import DScoreError, ModelError

T = TypeVar("T")


class Processes:
    """All processes of the launch; one where there was none.

    Attributes:
        index: of this process, 0 for the first.
        number: of processes.
        device: that accelerate gives this process.

    Raises:
        ModelError: if several were launched but do not know of each other.
    """

    def __init__(self) -> None:
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if state.num_processes != launched:  # each would do everything
            raise ModelError(
                f"{launched} processes were launched but accelerate works with {state.num_processes}; on CPUs set "
                "ACCELERATE_USE_CPU=true before accelerate starts"
            )
        self.index: int = state.process_index
        self.number: int = state.num_processes
        self.device: torch.device = state.device

    def once(self, do: Callable[[], T]) -> T:
        """Let the first process do something, and give its result, or its DScoreError, to all."""
        answer: list[Any] = [None]
        if self.index == 0:
            try:
                answer = [do()]
            except DScoreError as error:
                answer = [error]
        if self.number > 1:
            broadcast_object_list(answer)
        if isinstance(answer[0], DScoreError):
            raise answer[0]
        result: T = answer[0]
        return result

    def share(self, tasks: Sequence[T], cost: Callable[[T], float]) -> list[T]:
        """Return this process's tasks: the dearest first, each to the process that has least to do."""
        loads, mine = [0.0] * self.number, []
        for task in sorted(tasks, key=cost, reverse=True):
            least = loads.index(min(loads))
            loads[least] += cost(task)
            if least == self.index:
                mine.append(task)
        return mine

    def gather(self, results: list[T]) -> list[T]:
        """Return the results of all processes, those of the first one first."""
        gathered: list[T] = gather_object(results)
        return gathered
