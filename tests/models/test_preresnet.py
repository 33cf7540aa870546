"""The pre-activation networks against their definition, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin.errors import ModelError
from dscore_plugin.models import create_model
from dscore_plugin.models.cifar_preresnet import CifarPreResNet


def parameters(depth: int) -> int:
    """Count by hand: convolutions, two numbers for each channel of a norm, the classifier."""
    blocks, stream, total = (depth - 2) // 9, 16, 3 * 16 * 9
    for width in (16, 32, 64):
        for block in range(blocks):
            total += 2 * (stream + width + width) + stream * width + 9 * width * width + 4 * width * width
            total += stream * 4 * width if block == 0 else 0
            stream = 4 * width
    return total + 2 * stream + 10 * stream + 10


@pytest.mark.parametrize("depth", [20, 56, 110, 164])
def test_sizes(depth):
    model = create_model(f"cifar_preresnet{depth}")
    assert sum(p.numel() for p in model.parameters()) == parameters(depth)


def by_definition(state: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    def norm(name: str, x: Tensor) -> Tensor:
        mean, variance, scale, shift = (
            state[f"{name}.{key}"].view(1, -1, 1, 1)
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.relu((x - mean) / torch.sqrt(variance + 1e-5) * scale + shift)

    x = functional.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = functional.conv2d(norm(f"{name}.bn1", x), state[f"{name}.conv1.weight"])
            y = functional.conv2d(norm(f"{name}.bn2", y), state[f"{name}.conv2.weight"], None, stride, 1)
            y = functional.conv2d(norm(f"{name}.bn3", y), state[f"{name}.conv3.weight"])
            if block == 0:
                x = functional.conv2d(x, state[f"{name}.shortcut.weight"], None, stride)
            x = x + y
    x = norm("bn", x).mean(dim=(2, 3))
    return x @ state["classifier.weight"].T + state["classifier.bias"]


@torch.no_grad()
def test_outputs_are_those_of_the_definition():
    torch.manual_seed(0)
    model = create_model("cifar_preresnet20").eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        model(images), by_definition(model.state_dict(), images, 2), rtol=1e-3, atol=1e-3
    )


def test_initial_weights_are_he_normal_by_fan_out_and_scales_are_one():
    torch.manual_seed(0)
    model = create_model("cifar_preresnet56")
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))


def test_the_state_has_nothing_but_weights_and_statistics():
    keys = create_model("cifar_preresnet20").state_dict().keys()
    assert not [key for key in keys if "select" in key]


@pytest.mark.parametrize("depth", [2, 10, 21])
def test_other_depths_are_refused(depth):
    with pytest.raises(ModelError, match="9n"):
        CifarPreResNet(depth)
