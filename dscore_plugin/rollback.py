"""Undo what a removal did to a network if it fails half-way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_TABLES = ("_parameters", "_buffers", "_modules")


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


def _snapshot(module: nn.Module) -> dict[str, Any]:
    return {key: dict(value) if key in _TABLES else value for key, value in module.__dict__.items()}
