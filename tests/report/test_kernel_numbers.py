"""Physical and effective numbers of a network that has lost kernels."""

from __future__ import annotations

import torch
from torch import nn

from dscore_plugin.report.kernel_numbers import kernel_numbers
from dscore_plugin.surgery.kernels import prune_kernels


def test_numbers_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 2, 3, stride=2, padding=1, bias=False)
    )
    keep = torch.zeros(2, 4, dtype=torch.bool)
    keep[0, 1] = keep[1, 1] = keep[1, 3] = True
    prune_kernels(model, {"1": keep})
    numbers = kernel_numbers(model, torch.zeros(1, 3, 8, 8))
    first, second = 4 * 3 * 9, 2 * 4 * 9
    assert numbers["params"] == {"physical": first + second, "effective": first + 3 * 9}
    assert numbers["macs"] == {"physical": first * 64 + second * 16, "effective": first * 64 + 3 * 9 * 16}
    assert numbers["kernels"] == {"physical": 20, "effective": 15, "sparsity": 0.25}
