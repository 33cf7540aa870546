"""The arguments of one forward pass."""

from __future__ import annotations

from typing import Any


def as_arguments(example_inputs: Any) -> tuple[Any, ...]:
    """Return the arguments of one forward pass as a tuple; what is no tuple, such as a tensor, is one argument."""
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
