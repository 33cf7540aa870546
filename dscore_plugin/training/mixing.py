"""Mixup and cutmix, as a pure function of seed, epoch and step.

timm draws one share, and one box, for a whole batch, and mixes its first image with its last, the second with the last
but one, and so on. So a batch can be divided between processes wherever the two images of a pair stay together
(:func:`~dscore_plugin.training.batches.share_of_pairs`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dscore_plugin.randomness import own_random_numbers
from dscore_plugin.training.batches import MIXING, stream_seed


@dataclass(frozen=True)
class Mixer:
    """Mix the images of a batch with their partners.

    Args:
        mixup: alpha of mixup; 0 leaves it out.
        cutmix: alpha of cutmix; 0 leaves it out.
        seed: of the run.
    """

    mixup: float
    cutmix: float
    seed: int

    def __call__(self, images: Tensor, epoch: int, step: int) -> Tensor:
        """Mix images in place; the partner of image ``i`` of ``B`` is image ``B - 1 - i``.

        Args:
            images: shape ``(B, C, H, W)``, with an even ``B``.
            epoch: counted from 0.
            step: counted from 0 within the epoch. All parts of one batch are mixed alike.

        Returns:
            How much of each image is in each: shape ``(B, B)``, float32, rows sum to 1.
        """
        from timm.data import Mixup

        batch = len(images)
        mix = Mixup(mixup_alpha=self.mixup, cutmix_alpha=self.cutmix, label_smoothing=0.0, num_classes=batch)
        with own_random_numbers() as reseed:
            reseed(stream_seed(self.seed, epoch, step, MIXING))
            _, shares = mix(images, torch.arange(batch, device=images.device))  # each image is its own class
        return shares


def mixed_targets(shares: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the class probabilities of mixed images.

    Args:
        shares: as :class:`Mixer` gives them, ``(B, B)``.
        labels: of the images before they were mixed, ``(B,)``.
        classes: how many there are.

    Returns:
        Shape ``(B, classes)``, float32.
    """
    return shares @ functional.one_hot(labels, classes).to(shares.dtype)
