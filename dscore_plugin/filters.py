"""Weights with their filters along dim 0, whatever the layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def filters_first(layer: Any, weight: Tensor) -> Tensor:
    """Lay out a layer's weight as convolutions and linear layers have it.

    Args:
        layer: a convolution, transposed or not, or a linear layer.
        weight: its weight, or something of that shape, such as the gradient; transposed convolutions have
            ``(in, out / groups, ...)``.

    Returns:
        Shape ``(out, in / groups, ...)``.
    """
    if not getattr(layer, "transposed", False):
        return weight
    return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
