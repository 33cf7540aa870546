"""DenseNets for 32x32 images: growth 12, three dense blocks.

Source: Huang et al., *Densely Connected Convolutional Networks*, arXiv 1608.06993, sec. 4; the 100 layers of
arXiv 2201.11209 (16 dense layers in each block).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin.datasets import IMAGENET_MEAN, IMAGENET_STD
from dscore_plugin.errors import ModelError
from dscore_plugin.models.base import ImageClassifier, pretrained_cfg

BLOCKS = 3


class DenseLayer(nn.Module):
    """Batch norm, ReLU and a 3x3 convolution that adds channels, in a bottleneck behind a 1x1 convolution.

    Args:
        in_channels: width of the input.
        growth: channels that it makes.
        bottleneck: the 1x1 convolution makes so many times ``growth`` channels; 0 leaves it out.
    """

    def __init__(self, in_channels: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1: nn.Conv2d | None = None
        self.norm2: nn.BatchNorm2d | None = None
        if bottleneck:
            self.conv1 = nn.Conv2d(in_channels, bottleneck * growth, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(bottleneck * growth)
        self.conv2 = nn.Conv2d(bottleneck * growth or in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to the new channels, ``(B, growth, H, W)``."""
        x = functional.relu(self.norm1(x))
        if self.conv1 is not None and self.norm2 is not None:
            x = functional.relu(self.norm2(self.conv1(x)))
        return self.conv2(x)


class DenseBlock(nn.Sequential):
    """Dense layers, each of which reads the channels of all before it."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, C + layers * growth, H, W)``."""
        for layer in self:
            x = torch.cat([x, layer(x)], 1)
        return x


class Transition(nn.Module):
    """Batch norm, ReLU, a 1x1 convolution and the mean over 2x2 pixels.

    Args:
        in_channels: width of the input.
        channels: width of the output.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, channels, H / 2, W / 2)``."""
        return functional.avg_pool2d(self.conv(functional.relu(self.norm(x))), 2)


class CifarDenseNet(ImageClassifier):
    """Three dense blocks with transitions between them.

    Args:
        depth: convolutions and the classifier: ``3 n + 4`` with n layers in each block, ``6 n + 4`` with bottlenecks.
        num_classes: outputs; 0 returns the embedding.
        in_chans: channels of the images.
        drop_rate: dropout in front of the classifier.
        growth: channels that each layer adds.
        bottleneck: DenseNet-BC: bottlenecks of four times the growth, transitions that halve the channels, and a
            first convolution of twice the growth instead of 16.

    Raises:
        ModelError: if ``depth`` is not of that form, or ``growth`` is less than 1.

    Source: arXiv 1608.06993, sec. 3 and 4.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        growth: int = 12,
        bottleneck: bool = True,
    ) -> None:
        layers, rest = divmod(depth - BLOCKS - 1, BLOCKS * (2 if bottleneck else 1))
        if layers < 1 or rest:
            form = "6n + 4" if bottleneck else "3n + 4"
            raise ModelError(f"depth {depth} is not of the form {form}; expected 10, 16, 22, 40, 100, ...")
        if growth < 1:
            raise ModelError(f"growth is {growth}; expected 1 or more")
        width = 2 * growth if bottleneck else 16
        body: list[nn.Module] = []
        stem = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        for block in range(BLOCKS):
            widths = range(width, width + layers * growth, growth)
            body.append(DenseBlock(*(DenseLayer(w, growth, 4 if bottleneck else 0) for w in widths)))
            width += layers * growth
            if block < BLOCKS - 1:
                body.append(Transition(width, width // 2 if bottleneck else width))
                width = width // 2 if bottleneck else width
        super().__init__(num_features=width, drop_rate=drop_rate)
        self.conv1 = stem
        self.block1, self.transition1, self.block2, self.transition2, self.block3 = body
        self.norm = nn.BatchNorm2d(width)
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last feature map, ``(B, C, H, W)`` images to ``(B, num_features, H / 4, W / 4)``."""
        x = self.transition1(self.block1(self.conv1(x)))
        return functional.relu(self.norm(self.block3(self.transition2(self.block2(x)))))


_CFG = pretrained_cfg(
    (3, 32, 32), 10, IMAGENET_MEAN, IMAGENET_STD, first_conv="conv1", classifier="classifier"
)
default_cfgs = generate_default_cfgs({"cifar_densenet40": _CFG, "cifar_densenet100_k12": _CFG})


@register_model
def cifar_densenet40(pretrained: bool = False, **kwargs: Any) -> CifarDenseNet:
    """Build DenseNet-40 of growth 12, without bottlenecks: 1,019,722 parameters."""
    return build_model_with_cfg(
        CifarDenseNet, "cifar_densenet40", pretrained, depth=40, **{"bottleneck": False, **kwargs}
    )


@register_model
def cifar_densenet100_k12(pretrained: bool = False, **kwargs: Any) -> CifarDenseNet:
    """Build DenseNet-BC-100 of growth 12: 769,162 parameters."""
    return build_model_with_cfg(CifarDenseNet, "cifar_densenet100_k12", pretrained, depth=100, **kwargs)
