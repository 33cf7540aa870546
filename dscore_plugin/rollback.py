"""What every removal promises: the network runs afterwards, or is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dscore_plugin.errors import ModelError

_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


@contextmanager
def rolled_back_on_error(model: nn.Module) -> Iterator[None]:
    """Put every module's tables and attributes back if the block raises.

    Good for removals that replace parameters, buffers, modules and attributes and never write into them.
    """
    before = [(module, _snapshot(module)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, state in before:
            module.__dict__.clear()
            module.__dict__.update(state)
        raise


def check_runs(model: nn.Module, example_inputs: tuple[Any, ...], removed: str, advice: str) -> None:
    """Put a network into eval mode and run it once.

    Args:
        model: the network after a removal.
        example_inputs: the arguments of one forward pass.
        removed: what has left it.
        advice: what to do if it does not run.

    Raises:
        ModelError: if it does not.
    """
    model.eval()
    try:
        with torch.no_grad():  # no inference mode: what a network caches here must still be trainable
            model(*example_inputs)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run after the removal of {removed}: {error}; {advice}"
        ) from error


def _snapshot(module: nn.Module) -> dict[str, Any]:
    return {key: value.copy() if key in _TABLES else value for key, value in module.__dict__.items()}
