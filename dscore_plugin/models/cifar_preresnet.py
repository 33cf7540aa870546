"""Pre-activation residual networks of bottleneck blocks for 32x32 images, prunable at every block's input.

Source: He et al., *Identity Mappings in Deep Residual Networks*, arXiv 1603.05027; the channel selection of
*Dependency-Aware Filter Pruning*, arXiv 2005.02634.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin.datasets import IMAGENET_MEAN, IMAGENET_STD
from dscore_plugin.errors import ModelError
from dscore_plugin.models.base import ImageClassifier, pretrained_cfg
from dscore_plugin.surgery.inputs import ChannelSelection

WIDTHS = (16, 32, 64)
EXPANSION = 4


class PreActivationBottleneck(nn.Module):
    """Three convolutions, 1x1, 3x3 and 1x1, each behind batch norm and ReLU, added to the residual stream.

    ``select`` passes every channel on until the block's input is pruned; ``bn1`` and the stream keep their width.

    Args:
        in_channels: width of the stream in front of the block.
        channels: width inside the block; the stream behind it is four times as wide.
        stride: of the 3x3 convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = EXPANSION * channels
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.select = ChannelSelection()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, 4 channels, H / stride, W / stride)``."""
        residual = self.conv1(self.select(functional.relu(self.bn1(x))))
        residual = self.conv2(functional.relu(self.bn2(residual)))
        residual = self.conv3(functional.relu(self.bn3(residual)))
        return residual + (x if self.shortcut is None else self.shortcut(x))


class CifarPreResNet(ImageClassifier):
    """Three stages of bottleneck blocks of 16, 32 and 64 channels on a residual stream of 64, 128 and 256.

    Args:
        depth: ``9n + 2`` layers, with n blocks in each stage.
        num_classes: outputs; 0 returns the embedding, ``(B, 256)``.
        in_chans: channels of the images.
        drop_rate: dropout in front of the classifier.

    Raises:
        ModelError: if ``depth`` is no ``9n + 2``.

    Source: arXiv 1603.05027; He-normal weights by fan-out and scales of 1, as in arXiv 2005.02634.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0) -> None:
        if depth < 11 or (depth - 2) % 9:
            raise ModelError(f"depth {depth} is not of the form 9n + 2; expected 11, 20, 29, 38, ...")
        super().__init__(num_features=EXPANSION * WIDTHS[-1], drop_rate=drop_rate)
        blocks = (depth - 2) // 9
        self.conv1 = nn.Conv2d(in_chans, WIDTHS[0], 3, padding=1, bias=False)
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], 1, blocks)
        self.layer2 = _stage(EXPANSION * WIDTHS[0], WIDTHS[1], 2, blocks)
        self.layer3 = _stage(EXPANSION * WIDTHS[1], WIDTHS[2], 2, blocks)
        self.bn = nn.BatchNorm2d(EXPANSION * WIDTHS[2])
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last feature map, ``(B, C, H, W)`` images to ``(B, 256, H / 4, W / 4)``."""
        return functional.relu(self.bn(self.layer3(self.layer2(self.layer1(self.conv1(x))))))


def _stage(in_channels: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
    first = PreActivationBottleneck(in_channels, channels, stride)
    others = (PreActivationBottleneck(EXPANSION * channels, channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(first, *others)


_CFG = pretrained_cfg(
    (3, 32, 32), 10, IMAGENET_MEAN, IMAGENET_STD, first_conv="conv1", classifier="classifier"
)
default_cfgs = generate_default_cfgs({f"cifar_preresnet{depth}": _CFG for depth in (20, 56, 110, 164)})


def _build(depth: int, pretrained: bool, **kwargs: Any) -> CifarPreResNet:
    return build_model_with_cfg(CifarPreResNet, f"cifar_preresnet{depth}", pretrained, depth=depth, **kwargs)


@register_model
def cifar_preresnet20(pretrained: bool = False, **kwargs: Any) -> CifarPreResNet:
    """Build the pre-activation ResNet-20 of bottleneck blocks: 219,482 parameters."""
    return _build(20, pretrained, **kwargs)


@register_model
def cifar_preresnet56(pretrained: bool = False, **kwargs: Any) -> CifarPreResNet:
    """Build the pre-activation ResNet-56 of bottleneck blocks: 590,426 parameters."""
    return _build(56, pretrained, **kwargs)


@register_model
def cifar_preresnet110(pretrained: bool = False, **kwargs: Any) -> CifarPreResNet:
    """Build the pre-activation ResNet-110 of bottleneck blocks: 1,146,842 parameters."""
    return _build(110, pretrained, **kwargs)


@register_model
def cifar_preresnet164(pretrained: bool = False, **kwargs: Any) -> CifarPreResNet:
    """Build the pre-activation ResNet-164 of bottleneck blocks: 1,703,258 parameters."""
    return _build(164, pretrained, **kwargs)
