"""Trains this package's CIFAR networks faster on a CPU with AMX: kernels of the benchmark, not of the package.

PyTorch's batch norm for bfloat16 images in channels_last runs scalar over few channels, and oneDNN's convolutions are
slow on small maps, their weight gradients above all (``benchmarks/amx_times.py``). Here a convolution goes together
with its batch norm, the residual sum and the ReLU: the same arithmetic, bfloat16 between the layers and float32 sums,
so that results differ by rounding. ``benchmarks/with_amx.py`` runs ``dscore`` with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from amx.blocks import fits, residual_block, stem
from amx.library import REQUIREMENT, available
from amx.units import conv_norm_relu, max_pool
from dscore_plugin.models.cifar_resnet import BasicBlock, CifarResNet
from dscore_plugin.models.cifar_vgg import VGG

__all__ = ["REQUIREMENT", "available", "fast_training"]


@contextmanager
def fast_training() -> Iterator[None]:
    """Let CIFAR ResNets and VGGs compute with these kernels under bfloat16 autocast; raise OSError without them."""
    if not available():
        raise OSError(REQUIREMENT)
    patched = (
        (BasicBlock, "forward", _block),
        (CifarResNet, "forward_features", _resnet),
        (VGG, "forward_features", _vgg),
    )
    before = [getattr(owner, name) for owner, name, _ in patched]
    try:
        for (owner, name, fast), slow in zip(patched, before, strict=True):
            setattr(owner, name, _unless_unfit(fast, slow))
        yield
    finally:
        for (owner, name, _), slow in zip(patched, before, strict=True):
            setattr(owner, name, slow)


def _unless_unfit(fast: Any, slow: Any) -> Any:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        fit = torch.is_autocast_enabled("cpu") and x.device.type == "cpu"
        return fast(self, x) if fit else slow(self, x)

    return forward


def _block(self: BasicBlock, x: Tensor) -> Tensor:
    convs, norms = (self.conv1, self.conv2), (self.bn1, self.bn2)
    if fits(x, convs):
        return residual_block(x, convs, norms, None if self.shortcut is None else self.shortcut(x))
    skip = self._skip(x, SimpleNamespace(shape=(len(x), self.conv2.out_channels)))  # type: ignore[arg-type]
    residual = conv_norm_relu(x, self.conv1, self.bn1)
    return conv_norm_relu(residual, self.conv2, self.bn2, skip)


def _resnet(self: CifarResNet, x: Tensor) -> Tensor:
    plain = fits(x, [self.conv1]) and not x.requires_grad
    x = stem(x, self.conv1, self.bn1) if plain else conv_norm_relu(x, self.conv1, self.bn1)
    return self.layer3(self.layer2(self.layer1(x)))


def _vgg(self: VGG, x: Tensor) -> Tensor:
    layers = list(self.features)
    while layers:
        layer = layers.pop(0)
        if isinstance(layer, nn.Conv2d):
            norm, _ = layers.pop(0), layers.pop(0)
            assert isinstance(norm, nn.BatchNorm2d)
            x = conv_norm_relu(x, layer, norm)
        elif (
            isinstance(layer, nn.MaxPool2d) and x.shape[2] % 2 == x.shape[3] % 2 == 0
        ):  # VGG's are 2 x 2, behind ReLUs
            x = max_pool(x)
        else:
            x = layer(x)
    return x
