"""A small network for scikit-learn's 8x8 digits: trains in seconds on a processor."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from dscore_plugin.datasets import DIGITS_MEAN, DIGITS_STD
from dscore_plugin.models.base import pretrained_cfg
from dscore_plugin.models.cifar_vgg import VGG

default_cfgs = generate_default_cfgs(
    {"digits_cnn": pretrained_cfg((1, 8, 8), 10, DIGITS_MEAN, DIGITS_STD, "features.0", "classifier")}
)


@register_model
def digits_cnn(pretrained: bool = False, **kwargs: Any) -> VGG:
    """Build four convolutions of 16, 32, 64 and 64 channels, in two blocks, and a linear layer."""
    return build_model_with_cfg(VGG, "digits_cnn", pretrained, widths=((16, 32), (64, 64)), **kwargs)
