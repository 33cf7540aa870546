"""VGG networks for 32x32 images, and plain convolutional networks of the same form.

Source: Simonyan and Zisserman, *Very Deep Convolutional Networks*, arXiv 1409.1556, configurations D and E;
Park et al., *D-Score*, arXiv 2308.04470, for ``cifar_vgg16_dscore``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from dscore_plugin.datasets import IMAGENET_MEAN, IMAGENET_STD
from dscore_plugin.models.base import ImageClassifier, pretrained_cfg

VGG16 = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)
VGG19 = ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4)


class VGG(ImageClassifier):
    """Blocks of bias-free 3x3 conv + batch norm + ReLU, each closed by 2x2 max-pooling; then a linear head.

    ``features.N`` is numbered as in torchvision's ``vgg16_bn`` (where no dropout stands between the layers).

    Args:
        widths: channels of every convolution, block by block.
        num_classes: outputs; 0 returns the embedding.
        in_chans: channels of the images.
        drop_rate: dropout in front of the classifier.
        block_dropout: dropout rate inside each block, between its convolutions; empty for none.
        hidden: widths of hidden linear layers, each with batch norm, ReLU and dropout (``hidden_dropout``),
            which also stands in front of the first.
        hidden_dropout: see ``hidden``.
    """

    def __init__(
        self,
        widths: Sequence[Sequence[int]],
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        block_dropout: Sequence[float] = (),
        hidden: Sequence[int] = (),
        hidden_dropout: float = 0.0,
    ) -> None:
        super().__init__(num_features=[widths[-1][-1], *hidden][-1], drop_rate=drop_rate)
        rates = block_dropout or [0.0] * len(widths)
        inputs = [in_chans, *(block[-1] for block in widths[:-1])]
        blocks = zip(inputs, widths, rates, strict=True)
        self.features = nn.Sequential(*(layer for block in blocks for layer in _block(*block)))
        self.hidden = nn.Sequential(*_hidden_layers(widths[-1][-1], hidden, hidden_dropout))
        self.reset_classifier(num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        classifier = self.get_classifier()
        if isinstance(classifier, nn.Linear):
            nn.init.normal_(classifier.weight, std=0.01)
            nn.init.zeros_(classifier.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last feature map, ``(B, C, H, W)`` images to ``(B, 512, H / 32, W / 32)``."""
        return self.features(x)

    def embed(self, features: Tensor) -> Tensor:
        """Turn the last feature map into the embedding, ``(B, num_features)``."""
        return self.hidden(super().embed(features))


def _block(in_channels: int, widths: Sequence[int], dropout: float) -> Iterator[nn.Module]:
    for position, (before, width) in enumerate(pairwise([in_channels, *widths])):
        if dropout and position:
            yield nn.Dropout(dropout)
        yield nn.Conv2d(before, width, 3, padding=1, bias=False)
        yield nn.BatchNorm2d(width)
        yield nn.ReLU(inplace=True)
    yield nn.MaxPool2d(2)


def _hidden_layers(in_features: int, widths: Sequence[int], dropout: float) -> Iterator[nn.Module]:
    if widths:
        yield nn.Dropout(dropout)
    for before, width in pairwise([in_features, *widths]):
        yield nn.Linear(before, width, bias=False)
        yield nn.BatchNorm1d(width)
        yield nn.ReLU(inplace=True)
        yield nn.Dropout(dropout)


_CFG = pretrained_cfg(
    (3, 32, 32), 10, IMAGENET_MEAN, IMAGENET_STD, first_conv="features.0", classifier="classifier"
)
default_cfgs = generate_default_cfgs(
    dict.fromkeys(("cifar_vgg16_bn", "cifar_vgg19_bn", "cifar_vgg16_dscore"), _CFG)
)


@register_model
def cifar_vgg16_bn(pretrained: bool = False, **kwargs: Any) -> VGG:
    """Build VGG-16 for CIFAR with one linear layer: 14,724,042 parameters."""
    return build_model_with_cfg(VGG, "cifar_vgg16_bn", pretrained, widths=VGG16, **kwargs)


@register_model
def cifar_vgg19_bn(pretrained: bool = False, **kwargs: Any) -> VGG:
    """Build VGG-19 for CIFAR with one linear layer: 20,035,018 parameters."""
    return build_model_with_cfg(VGG, "cifar_vgg19_bn", pretrained, widths=VGG19, **kwargs)


@register_model
def cifar_vgg16_dscore(pretrained: bool = False, **kwargs: Any) -> VGG:
    """Build the VGG-16 that D-Score was measured on: hidden linear layers of 4096 and 512, and dropout.

    The paper's code names the rates 0.3 / 0.4 / 0.5 without their places; read as is customary for this
    network: 0.3 within the first block, 0.4 within the others, 0.5 around the linear layers. Biases in
    front of a batch norm, which it cancels, are left out. Its L2 penalty (1e-3) is left to the
    trainer's weight decay.

    Source: Park et al., *D-Score*, arXiv 2308.04470, and its published code.
    """
    arguments: dict[str, Any] = {
        "widths": VGG16,
        "block_dropout": (0.3, 0.4, 0.4, 0.4, 0.4),
        "hidden": (4096, 512),
        "hidden_dropout": 0.5,
    }
    return build_model_with_cfg(VGG, "cifar_vgg16_dscore", pretrained, **(arguments | kwargs))
