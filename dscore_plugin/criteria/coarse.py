"""Coarse pruning: of many random masks over the whole network, the one that misclassifies least.

A candidate is one mask for all pruned layers together; every layer gives the same share of its feature maps or of its
kernels. This page draws one layer's part of a candidate; :mod:`dscore_plugin.selection.candidates` draws whole
candidates and compares them.

Source: Anwar and Sung, *Compact Deep Convolutional Neural Networks with Coarse Pruning*, arXiv 1610.09639, sec. 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dscore_plugin.errors import CriterionError

TEMPERATURE = 0.1


def draw_leaving(
    uniform: Tensor, count: int, scores: Tensor | None = None, temperature: float = TEMPERATURE
) -> Tensor:
    """Draw which units of a layer leave: any subset alike, or rather those that a criterion would remove.

    The paper draws uniformly. With scores (ours), units leave one after the other, each of those left with a
    probability proportional to ``exp(-place / temperature)``, where ``place`` in [0, 1] is the unit's place in the
    order of the scores, lowest first. A high temperature draws uniformly, a temperature near 0 gives what the
    criterion itself removes; in between, the border between what leaves and what stays is blurred over a width of
    about ``temperature``, as a share of the layer. Places make scores of any scale alike.

    The draw is the ``count`` largest of ``-place / temperature + g`` with standard Gumbel numbers
    ``g = -log(-log u)``; without scores, of ``g`` alone.

    Args:
        uniform: independent random numbers in (0, 1), one for each unit, shape ``(n,)``, float64.
        count: how many units leave, 0 to n.
        scores: the importance of each unit, shape ``(n,)``; ties go to the lower index.
        temperature: above 0.

    Returns:
        The units that leave, ascending, int64, shape ``(count,)``.

    Raises:
        CriterionError: if the shapes differ, or ``count`` or ``temperature`` is out of range.

    Source: arXiv 1610.09639, sec. 3; for the draw around scores Kool et al., *Stochastic Beams and Where to Find
    Them*, arXiv 1903.06059, sec. 2.
    """
    if uniform.ndim != 1 or (scores is not None and scores.shape != uniform.shape):
        shape = None if scores is None else tuple(scores.shape)
        raise CriterionError(
            f"expected one number for each unit, got {tuple(uniform.shape)} and scores {shape}"
        )
    if not 0 <= count <= len(uniform) or not temperature > 0:
        raise CriterionError(
            f"expected 0 to {len(uniform)} units and a temperature above 0, got {count} and {temperature:g}"
        )
    gumbel = -torch.log(-torch.log(uniform.double()))
    keys = gumbel if scores is None else gumbel - places(scores) / temperature
    return keys.topk(count).indices.sort().values


def places(scores: Tensor) -> Tensor:
    """Return each unit's place in the order of the scores: 0 for the lowest, 1 for the highest.

    Args:
        scores: shape ``(n,)``; ties go to the lower index.

    Returns:
        Multiples of ``1 / (n - 1)``, shape ``(n,)``, float64.
    """
    order = torch.argsort(scores, stable=True)
    found = torch.empty(len(scores), dtype=torch.float64)
    found[order] = torch.arange(len(scores), dtype=torch.float64) / max(1, len(scores) - 1)
    return found


def misclassification_rate(correct: int, images: int) -> float:
    """Return the share of images classified wrongly, in percent: what the paper minimises (sec. 3)."""
    return 100 * (images - correct) / images
