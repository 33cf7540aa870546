"""The kernels that the benchmark trains with on CPUs with AMX, against float32 and against PyTorch's own bfloat16."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin import prune
from dscore_plugin.models import create_model
from dscore_plugin.models.cifar_resnet import BasicBlock

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import amx
from amx.blocks import fits
from amx.units import conv_norm_relu, max_pool

needs_amx = pytest.mark.skipif(not amx.available(), reason=amx.REQUIREMENT)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """The same numbers each time, and one thread, as the kernels compute."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def computed(model: nn.Module, images: Tensor, fast: bool, bfloat16: bool = True) -> dict[str, Tensor]:
    """Outputs, gradients and running statistics of one step with a fixed gradient of the output."""
    model, images = copy.deepcopy(model), images.clone().requires_grad_(True)
    with amx.fast_training() if fast else nullcontext(), torch.autocast("cpu", torch.bfloat16, bfloat16):
        output = model(images.bfloat16() if bfloat16 else images)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(output.shape, generator=generator).bfloat16()
    (output.float() * weights.float()).sum().backward()
    found = {"output": output.detach(), "images": images.grad}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    found |= dict(model.named_buffers())
    return {name: tensor.float() for name, tensor in found.items() if tensor is not None}


def randomised(model: nn.Module) -> nn.Module:
    """Norms that scale by any number, negative ones too, and weights that bfloat16 holds exactly."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def check(model: nn.Module, images: Tensor, looser: float = 1.3) -> None:
    """The kernels err against float32 as PyTorch's own bfloat16 does, give or take."""
    exact = computed(model, images, fast=False, bfloat16=False)
    slow, fast = computed(model, images, fast=False), computed(model, images, fast=True)
    compare(exact, slow, fast, looser)


def compare(
    exact: dict[str, Tensor], slow: dict[str, Tensor], fast: dict[str, Tensor], looser: float = 1.3
) -> None:
    assert fast.keys() == slow.keys()
    for name, wanted in exact.items():
        errors = [float((run[name] - wanted).norm() / wanted.norm().clamp_min(1e-6)) for run in (slow, fast)]
        assert errors[1] <= looser * errors[0] + 0.005, (name, errors)


def block(channels: int, inner: int, outputs: int, stride: int, shortcut: str = "pad") -> BasicBlock:
    """A residual block whose inner channels have been pruned."""
    built = BasicBlock(channels, outputs, stride, shortcut)  # type: ignore[arg-type]
    built.init_shortcut()
    built.conv1 = nn.Conv2d(channels, inner, 3, stride, 1, bias=False)
    built.bn1 = nn.BatchNorm2d(inner)
    built.conv2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False)
    return randomised(built).train()  # type: ignore[return-value]


@needs_amx
@pytest.mark.parametrize(
    ("shape", "inner", "outputs", "stride"),
    [
        ((9, 16, 32, 32), 8, 16, 1),
        ((5, 16, 32, 32), 13, 16, 1),
        ((9, 16, 32, 32), 1, 16, 1),
        ((6, 16, 32, 32), 5, 32, 2),
        ((9, 32, 16, 16), 15, 32, 1),
        ((9, 32, 16, 16), 22, 32, 1),
        ((6, 32, 16, 16), 33, 64, 2),
        ((37, 64, 8, 8), 31, 64, 1),
        ((33, 64, 8, 8), 64, 64, 1),
        ((7, 8, 12, 8), 6, 8, 1),
    ],
)
def test_residual_blocks(shape: tuple[int, ...], inner: int, outputs: int, stride: int) -> None:
    model, images = block(shape[1], inner, outputs, stride), torch.randn(shape).bfloat16().float()
    assert fits(images, (model.conv1, model.conv2))
    check(model, images)


@needs_amx
def test_a_block_with_a_shortcut_of_its_own() -> None:
    check(block(16, 7, 32, 2, "conv"), torch.randn(6, 16, 32, 32).bfloat16().float())


@needs_amx
def test_a_block_of_maps_that_do_not_fit() -> None:
    model, images = block(16, 9, 16, 1), torch.randn(6, 16, 7, 7).bfloat16().float()
    assert not fits(images, (model.conv1, model.conv2))
    check(model, images)


@needs_amx
def test_a_frozen_norm_keeps_its_statistics() -> None:
    model = block(16, 9, 16, 1).eval()
    images = torch.randn(6, 16, 16, 16).bfloat16().float()
    with torch.no_grad():
        wanted = model(images)
        with amx.fast_training(), torch.autocast("cpu", torch.bfloat16):
            found = model(images.bfloat16())
    assert float((found - wanted).norm() / wanted.norm()) < 0.01
    assert int(model.bn1.num_batches_tracked) == 0


class Unit(nn.Module):
    """A convolution, its norm and a ReLU, as VGG has them."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.fast = True

    def forward(self, x: Tensor) -> Tensor:
        """Compute as the kernels do, or as PyTorch does."""
        if self.fast and torch.is_autocast_enabled("cpu"):
            return conv_norm_relu(x, self.conv, self.norm)
        return functional.relu(self.norm(self.conv(x)))


@needs_amx
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [
        ((130, 48, 4, 4), 40),
        ((33, 70, 8, 8), 33),
        ((128, 64, 2, 2), 96),
        ((40, 32, 1, 1), 32),
        ((6, 33, 16, 16), 47),
    ],
)
def test_convolutions_of_small_maps(shape: tuple[int, ...], outputs: int) -> None:
    unit, images = randomised(Unit(shape[1], outputs)).train(), torch.randn(shape).bfloat16().float()
    plain = copy.deepcopy(unit)
    plain.fast = False
    exact = computed(plain, images, fast=False, bfloat16=False)
    compare(exact, computed(plain, images, fast=False), computed(unit, images, fast=False))


@needs_amx
@pytest.mark.parametrize("channels", [3, 40])
def test_max_pooling_picks_what_pytorch_picks(channels: int) -> None:
    images = (
        torch.randn(5, channels, 6, 8).relu().bfloat16()
    )  # every other number is 0, so that many are equal
    found, wanted = images.clone().requires_grad_(True), images.clone().requires_grad_(True)
    gradient = torch.randn(5, channels, 3, 4).bfloat16()
    pooled, expected = max_pool(found), functional.max_pool2d(wanted, 2)
    pooled.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(pooled, expected)
    assert torch.equal(found.grad, wanted.grad)


@needs_amx
@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_vgg16_bn"])
def test_whole_networks_that_were_pruned(name: str) -> None:
    images = torch.randn(40, 3, 32, 32)
    model = prune(create_model(name), images[:1], "l1", ratio=0.45).train()
    check(model, images, looser=1.5)


@needs_amx
def test_nothing_stays_behind_and_float32_is_untouched() -> None:
    model, images = create_model("cifar_resnet20").eval(), torch.randn(2, 3, 32, 32)
    wanted = model(images)
    before = BasicBlock.forward

    def fail_in_the_middle() -> None:
        with amx.fast_training():
            assert BasicBlock.forward is not before
            assert torch.equal(model(images), wanted)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_in_the_middle()
    assert BasicBlock.forward is before


def test_without_the_instructions_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "available", lambda: False)
    with pytest.raises(OSError, match="amx_bf16"), amx.fast_training():
        pass
