"""Synaptic Strength: a connection counts for the variance that it brings to its output channel.

The connection from input channel c to output channel o is the 2-D kernel ``W[o, c]``. With the batch norm in front
of the convolution giving every channel the variance 1, what the kernel lets through is ``gamma_c ||W[o, c]||_F``.

Source: *Synaptic Strength For Convolutional Neural Network*, NeurIPS 2018, arXiv 1811.02454.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dscore_plugin.errors import CriterionError

# The paper's lambda for each of its networks (sec. 4); it starts small and enlarges until accuracy begins to fall.
LAMBDAS = {"vggnet": 1e-4, "resnet18": 1e-5, "densenet40": 5e-6, "imagenet": 1e-6}


def synaptic_strength(weight: Tensor, gamma: Tensor | None = None) -> Tensor:
    """Score every connection of a convolution: ``s[o, c] = gamma_c ||W[o, c]||_F``.

    Args:
        weight: of a convolution, ``(out, in / groups, ...)``, or of a linear layer, ``(out, in)``; any float dtype.
        gamma: the scales of the batch norm in front of it, ``(in,)``; None stands for ones: the first convolution,
            and convolutions that a residual sum feeds, for which the paper's derivation does not hold.

    Returns:
        Shape ``(out, in / groups)``, float32. It has the sign of gamma; the lowest magnitude is pruned first, by one
        threshold for the whole network.

    Raises:
        CriterionError: if the shapes do not fit each other, or a tensor holds NaN or infinity.

    Source: arXiv 1811.02454, eq. 6.
    """
    if weight.ndim < 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise CriterionError(
            f"expected the weight of a convolution, (out, in / groups, ...), got {_described(weight)}"
        )
    norms = weight.detach().to(torch.float64).reshape(*weight.shape[:2], -1).norm(dim=2)
    strength = norms if gamma is None else norms * _of_each_kernel(gamma, *weight.shape[:2])
    if not torch.isfinite(strength).all():
        raise CriterionError("the scales or weights hold NaN or infinity; check the checkpoint")
    return strength.float()


def input_strength(strength: Tensor, groups: int = 1) -> Tensor:
    """Score the input channels of a convolution: ``S_c = sum_o |s[o, c]|``.

    Args:
        strength: of the connections, ``(out, in / groups)``.
        groups: of the convolution; a channel is read by its own group's filters only.

    Returns:
        Shape ``(in,)``, float32, at least 0; the lowest is pruned first.

    Raises:
        CriterionError: if the output channels do not divide into ``groups``.
    """
    if strength.ndim != 2 or groups < 1 or len(strength) % groups:
        raise CriterionError(
            f"expected strengths of shape (out, in / groups) in {groups} groups, got {_described(strength)}"
        )
    return strength.abs().view(groups, -1, strength.shape[1]).sum(dim=1).flatten()


def _of_each_kernel(gamma: Tensor, outputs: int, inputs: int) -> Tensor:
    """Spread the scales of the input channels over the kernels that read them: ``(out, in / groups)``."""
    groups = len(gamma) // inputs if gamma.ndim == 1 else 0
    if not groups or groups * inputs != len(gamma) or outputs % groups:
        raise CriterionError(
            f"scales of shape {tuple(gamma.shape)} do not fit {outputs} outputs that read {inputs} inputs each"
        )
    per_group = gamma.detach().to(torch.float64).view(groups, inputs)
    return per_group.repeat_interleave(outputs // groups, dim=0)


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
