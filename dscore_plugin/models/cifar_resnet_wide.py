"""ResNet-18 for 32x32 images: ImageNet's four stages of 64 to 512 channels behind a 3x3 convolution, without pooling.

Source: He et al., arXiv 1512.03385, table 1; the stem that is customary on CIFAR, as in Synaptic Strength, arXiv
1811.02454, sec. 4.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from dscore_plugin.datasets import IMAGENET_MEAN, IMAGENET_STD
from dscore_plugin.models.base import pretrained_cfg


class WideCifarResNet(ResNet):
    """timm's residual network of basic blocks, for small images.

    Args:
        layers: blocks in each of the four stages.
        num_classes: outputs; 0 returns the embedding, ``(B, 512)``.
        in_chans: channels of the images.
        **options: of ``timm.models.resnet.ResNet``.
    """

    def __init__(
        self, layers: tuple[int, ...] = (2, 2, 2, 2), num_classes: int = 10, in_chans: int = 3, **options: Any
    ) -> None:
        super().__init__(
            BasicBlock,
            layers,
            num_classes=num_classes,
            in_chans=in_chans,
            **{"zero_init_last": False, **options},
        )
        self.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()


_CFG = pretrained_cfg((3, 32, 32), 10, IMAGENET_MEAN, IMAGENET_STD, first_conv="conv1", classifier="fc")
default_cfgs = generate_default_cfgs({"cifar_resnet18": _CFG})


@register_model
def cifar_resnet18(pretrained: bool = False, **kwargs: Any) -> WideCifarResNet:
    """Build ResNet-18 for CIFAR: 11,173,962 parameters."""
    return build_model_with_cfg(WideCifarResNet, "cifar_resnet18", pretrained, **kwargs)
