"""Discrimination-aware channel pruning: the joint loss of a layer, and what its gradient says of the input channels.

Source: Zhuang et al., *Discrimination-aware Channel Pruning for Deep Neural Networks*, NeurIPS 2018, arXiv 1810.11809.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dscore_plugin.errors import CriterionError, did_you_mean

READINGS = ("kernels", "slice")


def channel_scores(gradient: Tensor, reading: str = "kernels") -> Tensor:
    """Score a layer's input channels by the gradient of the joint loss; the highest is taken up first.

    ``"kernels"``: ``s_k = sum_j ||G_jk||_F``, over the output channels j, as in the authors' code.
    ``"slice"``: ``s_k = ||G_:k||_F``, the norm of the whole slice, as in the paper's text.

    Args:
        gradient: with respect to the layer's weight, shape ``(n, c, ...)``: outputs, inputs, positions.
        reading: ``"kernels"`` or ``"slice"``.

    Returns:
        Scores of shape ``(c,)``, at least float32.

    Raises:
        CriterionError: if ``reading`` is unknown, the gradient has fewer than two dimensions, or it is not finite.

    Source: arXiv 1810.11809, Algorithm 2.
    """
    check_reading(reading)
    if gradient.ndim < 2 or not gradient.is_floating_point():
        raise CriterionError(
            f"expected a floating-point gradient (outputs, inputs, ...), got shape {tuple(gradient.shape)} of "
            f"{gradient.dtype}"
        )
    if not torch.isfinite(gradient).all():
        raise CriterionError(
            "the gradient holds NaN or infinity; check the weights, the heads and the images"
        )
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    norms = wide.reshape(*wide.shape[:2], -1).norm(dim=2)  # ||G_jk||_F
    return norms.norm(dim=0) if reading == "slice" else norms.sum(dim=0)


def joint_loss(
    output: Tensor, reference: Tensor, logits: Tensor | None, labels: Tensor, strength: float
) -> Tensor:
    """Compute ``L = L_M + lambda L_S`` of a batch: the mean squared error of a layer's output, and cross-entropy.

    Without the factor 1/2 that the paper's equation gives L_M, as in the authors' code.

    Args:
        output: of the layer that is pruned, shape ``(b, n, ...)``.
        reference: of the same layer before pruning.
        logits: of the head behind the layer, ``(b, classes)``; not looked at where ``strength`` is 0.
        labels: ``(b,)``.
        strength: lambda.

    Returns:
        The loss, a scalar: the mean over the batch.

    Source: arXiv 1810.11809, sec. 3.
    """
    reconstruction = functional.mse_loss(output, reference)
    if not strength or logits is None:
        return reconstruction
    return reconstruction + strength * functional.cross_entropy(logits, labels)


def has_settled(before: float, after: float, initial: float, epsilon: float) -> bool:
    """Whether one more channel hardly changed the loss: ``|L(W^{t-1}) - L(W^t)| / L(W^0) <= epsilon`` (DCP-Adapt).

    Args:
        before: the joint loss before the channel was added.
        after: after it was, and the layer was optimised.
        initial: with no channel at all.
        epsilon: the tolerance.

    Source: arXiv 1810.11809, sec. 3, stopping conditions.
    """
    return abs(before - after) <= epsilon * initial


def check_reading(reading: str) -> None:
    """Raise CriterionError if a reading of the score is unknown."""
    if reading not in READINGS:
        raise CriterionError(
            f"reading {reading!r} is unknown; expected one of {', '.join(READINGS)}"
            + did_you_mean(str(reading), READINGS)
        )
