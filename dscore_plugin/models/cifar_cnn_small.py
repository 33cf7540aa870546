"""The small plain network that coarse pruning was measured on.

Source: Anwar and Sung, arXiv 1610.09639, sec. 5.1 (CNN_small). The paper gives it as pruned:
``(128C3-83C3)-MP-(83C3-83C3)-MP-(166C3-166C3)-256FC-10``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from dscore_plugin.datasets import IMAGENET_MEAN, IMAGENET_STD
from dscore_plugin.errors import ModelError
from dscore_plugin.models.base import ImageClassifier, pretrained_cfg

CNN_SMALL = ((128, 128), (128, 128), (256, 256))


class PlainCNN(ImageClassifier):
    """Blocks of 3x3 conv + batch norm + ReLU with overlapping max-pooling between them; then two linear layers.

    The last feature map is not averaged: the first linear layer reads every position of it. Pooling windows of 3x3
    at a stride of 2 may reach over the edge, so that 32 x 32 images end as 8 x 8. Biases in front of a batch norm,
    which it cancels, are left out.

    Args:
        widths: channels of every convolution, block by block.
        hidden: width of the first linear layer, which has batch norm and ReLU.
        image_size: height and width of the images.
        num_classes: outputs; 0 returns the embedding, ``(B, hidden)``.
        in_chans: channels of the images.
        drop_rate: dropout in front of the classifier.

    Raises:
        ModelError: if the images are too small to be pooled.
    """

    def __init__(
        self,
        widths: Sequence[Sequence[int]] = CNN_SMALL,
        hidden: int = 256,
        image_size: int = 32,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_features=hidden, drop_rate=drop_rate)
        if image_size < 2 ** len(widths):
            raise ModelError(f"image_size {image_size} is too small; expected at least {2 ** len(widths)}")
        side = image_size
        for _ in widths[1:]:
            side = side // 2  # of (side - 3) / 2 + 1, rounded up
        inputs = [in_chans, *(block[-1] for block in widths[:-1])]
        blocks = [list(_block(before, block)) for before, block in zip(inputs, widths, strict=True)]
        pooled = [[*block, nn.MaxPool2d(3, 2, ceil_mode=True)] for block in blocks[:-1]]
        self.features = nn.Sequential(*(layer for block in (*pooled, blocks[-1]) for layer in block))
        self.hidden = nn.Sequential(
            nn.Linear(widths[-1][-1] * side**2, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
        )
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last feature map, ``(B, C, 32, 32)`` images to ``(B, 256, 8, 8)``."""
        return self.features(x)

    def embed(self, features: Tensor) -> Tensor:
        """Turn the last feature map into the embedding, ``(B, hidden)``."""
        return self.hidden(features.flatten(1))


def _block(in_channels: int, widths: Sequence[int]) -> Iterator[nn.Module]:
    for before, width in pairwise([in_channels, *widths]):
        yield nn.Conv2d(before, width, 3, padding=1, bias=False)
        yield nn.BatchNorm2d(width)
        yield nn.ReLU(inplace=True)


_CFG = pretrained_cfg(
    (3, 32, 32), 10, IMAGENET_MEAN, IMAGENET_STD, first_conv="features.0", classifier="classifier"
)
default_cfgs = generate_default_cfgs({"cifar_cnn_small": _CFG})


@register_model
def cifar_cnn_small(pretrained: bool = False, **kwargs: Any) -> PlainCNN:
    """Build coarse pruning's CNN_small, (2x128C3)-MP-(2x128C3)-MP-(2x256C3)-256FC-10: 5,529,994 parameters.

    The widths before pruning, the padding and the pooling's edge are deduced; the paper prints the pruned widths.

    Source: arXiv 1610.09639, sec. 5.1.
    """
    return build_model_with_cfg(PlainCNN, "cifar_cnn_small", pretrained, **kwargs)
