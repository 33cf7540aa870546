"""The CIFAR ResNets of 6n+2 layers.

Source: He et al., *Deep Residual Learning for Image Recognition*, arXiv 1512.03385, sec. 4.2, option A.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin.datasets import IMAGENET_MEAN, IMAGENET_STD
from dscore_plugin.errors import ModelError
from dscore_plugin.models.base import ImageClassifier, pretrained_cfg

Shortcut = Literal["pad", "conv"]
WIDTHS = (16, 32, 64)


def pad_channels(x: Tensor, channels: int) -> Tensor:
    """Widen ``x`` of shape ``(B, C, H, W)`` to ``channels``, zeros half in front and half behind."""
    missing = channels - x.shape[1]
    return functional.pad(x, (0, 0, 0, 0, missing // 2, missing - missing // 2))


def padding_weight(in_channels: int, out_channels: int) -> Tensor:
    """Write the zero padding of the channels as the weight of a 1x1 convolution.

    Args:
        in_channels: channels that pass through.
        out_channels: channels after the padding.

    Returns:
        Zeros and ones, shape ``(out_channels, in_channels, 1, 1)``, float32.
    """
    return pad_channels(torch.eye(in_channels)[..., None, None].transpose(0, 1), out_channels).transpose(0, 1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut without trained parameters.

    Args:
        in_channels: width of the input.
        channels: width of the output.
        stride: of the first convolution and of the shortcut.
        shortcut: how the shortcut widens and subsamples, see :class:`CifarResNet`.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 and shortcut == "conv":
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self._full_width = (channels, in_channels, 1, 1)
            self.register_load_state_dict_pre_hook(_fill_in_shortcut)

    def init_shortcut(self) -> None:
        """Give the convolution of the shortcut the zeros and ones that pad channels, for good."""
        if self.shortcut is not None:
            weight = padding_weight(self.shortcut.in_channels, self.shortcut.out_channels)
            self.shortcut.weight.data.copy_(weight)
            self.shortcut.weight.requires_grad_(False)

    def _skip(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.shortcut is not None:
            return self.shortcut(x)
        if self.stride == 1:
            return x
        # The width comes from the tensor itself: pruning leaves no attribute behind that could be stale.
        return pad_channels(x[:, :, :: self.stride, :: self.stride], residual.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, channels, H / stride, W / stride)``."""
        residual = functional.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return functional.relu(residual + self._skip(x, residual))


def _fill_in_shortcut(block: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a block with a shortcut convolution load, strictly, what a padding block has saved.

    Only at full width: which zeros and ones a pruned shortcut kept cannot be known, so there a missing
    weight stays the error that it is.
    """
    assert isinstance(block, BasicBlock)
    assert block.shortcut is not None
    key = f"{prefix}shortcut.weight"
    if key not in state_dict and tuple(block.shortcut.weight.shape) == block._full_width:
        like = state_dict.get(f"{prefix}conv1.weight", block.shortcut.weight)
        channels, in_channels, *_rest = block._full_width
        state_dict[key] = padding_weight(in_channels, channels).to(like)


class CifarResNet(ImageClassifier):
    """He et al.'s residual network for 32x32 images: three stages of 16, 32 and 64 channels.

    Args:
        depth: ``6n + 2`` layers, with n blocks in each stage.
        num_classes: outputs; 0 returns the embedding, ``(B, 64)``.
        in_chans: channels of the images.
        drop_rate: dropout in front of the classifier.
        shortcut: where a stage begins, ``"pad"`` takes every second pixel and pads zero channels (option A);
            ``"conv"`` does exactly the same as a 1x1 convolution of stride 2 with fixed zeros and ones, which
            lets dependency graphs follow the channels, so that the residual trunk can be pruned too. Either
            form loads the weights of the ``"pad"`` form strictly.

    Raises:
        ModelError: if ``depth`` is no ``6n + 2``, or ``shortcut`` is neither ``"pad"`` nor ``"conv"``.

    Source: He et al., *Deep Residual Learning for Image Recognition*, arXiv 1512.03385, sec. 4.2.
    """

    classifier_name: ClassVar[str] = "linear"

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        shortcut: Shortcut = "pad",
    ) -> None:
        if depth < 8 or (depth - 2) % 6:
            raise ModelError(f"depth {depth} is not of the form 6n + 2; expected 8, 14, 20, 26, 32, ...")
        if shortcut not in ("pad", "conv"):
            raise ModelError(f"shortcut {shortcut!r} is unknown; expected 'pad' or 'conv'")
        super().__init__(num_features=WIDTHS[-1], drop_rate=drop_rate)
        self.conv1 = nn.Conv2d(in_chans, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        blocks = (depth - 2) // 6
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], 1, blocks, shortcut)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], 2, blocks, shortcut)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], 2, blocks, shortcut)
        self.reset_classifier(num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
        for module in self.modules():
            if isinstance(module, BasicBlock):
                module.init_shortcut()

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last feature map, ``(B, C, H, W)`` images to ``(B, 64, H / 4, W / 4)``."""
        x = functional.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))


def _stage(in_channels: int, channels: int, stride: int, blocks: int, shortcut: Shortcut) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1, shortcut) for _ in range(blocks - 1)))


_CFG = pretrained_cfg((3, 32, 32), 10, IMAGENET_MEAN, IMAGENET_STD, first_conv="conv1", classifier="linear")
default_cfgs = generate_default_cfgs({f"cifar_resnet{depth}": _CFG for depth in (20, 32, 44, 56, 110)})


def _build(depth: int, pretrained: bool, **kwargs: Any) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, f"cifar_resnet{depth}", pretrained, depth=depth, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Build ResNet-20 for CIFAR: 269,722 parameters."""
    return _build(20, pretrained, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Build ResNet-32 for CIFAR: 464,154 parameters."""
    return _build(32, pretrained, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Build ResNet-44 for CIFAR: 658,586 parameters."""
    return _build(44, pretrained, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Build ResNet-56 for CIFAR: 853,018 parameters."""
    return _build(56, pretrained, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Build ResNet-110 for CIFAR: 1,727,962 parameters."""
    return _build(110, pretrained, **kwargs)
