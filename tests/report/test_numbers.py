"""The counter against torch's own, and measurements that leave the model as it was."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dscore_plugin.costs import count
from dscore_plugin.models import create_model
from dscore_plugin.report.numbers import file_sizes, latency, weight_bytes

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.GELU)
POOLINGS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def besides_products(model: nn.Module, image: Tensor) -> int:
    """What Torch-Pruning's counter adds to the multiply-accumulates of convolutions and linear layers."""
    total = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        kind = type(module)
        if kind is nn.BatchNorm2d:
            total += 2 * inputs[0].numel()
        elif kind in ACTIVATIONS:
            total += output.numel()
        elif kind in POOLINGS:
            total += inputs[0].numel()
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            total += output.numel()

    hooks = [module.register_forward_hook(add) for module in model.modules()]
    model(image)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv2_100", "vgg11_bn", "cifar_resnet20", "cifar_vgg16_bn"]
)
def test_macs_agree_with_torchs_flop_counter(name: str) -> None:
    model = create_model(name).eval()
    image = torch.randn(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    macs, params = count(model, image)
    assert counter.get_total_flops() % 2 == 0
    assert macs - besides_products(model, image) == counter.get_total_flops() // 2
    assert params == sum(parameter.numel() for parameter in model.parameters())
    assert isinstance(macs, int)
    assert isinstance(params, int)


def test_macs_are_those_of_one_image() -> None:
    model = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    for batch in (1, 5):
        assert count(model, torch.zeros(batch, 3, 10, 10)) == (8 * 3 * 9 * 100, 8 * 3 * 9)


def test_counting_changes_nothing() -> None:
    model = timm.create_model("resnet18").train()
    model.bn1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    count(model, (torch.randn(2, 3, 64, 64),))
    assert modes == [module.training for module in model.modules()]
    assert attributes == [set(vars(module)) for module in model.modules()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


class Watched(nn.Module):
    """Notes in which mode, with which input and under which gradient rule it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.seen: set[tuple[object, ...]] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add((self.training, tuple(x.shape), x.dtype, torch.is_inference_mode_enabled()))
        return self.norm(x)


def test_latency_runs_batches_in_eval_and_inference_mode() -> None:
    model = Watched().to(torch.float64).train()
    state = torch.get_rng_state()
    found = latency(model, (3, 4, 4), batch_sizes=(1, 6), min_run_time=0.02)
    assert model.seen == {(False, (batch, 3, 4, 4), torch.float64, True) for batch in (1, 6)}
    assert model.training
    assert model.norm.training
    assert model.norm.num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert found.keys() == {"1", "6"}
    for numbers in found.values():
        assert numbers.keys() == {"median", "iqr"}
        assert 0 < numbers["median"] < math.inf
        assert 0 <= numbers["iqr"] < math.inf


def test_latency_restores_the_mode_after_an_error() -> None:
    model = nn.Conv2d(3, 8, 3).train()
    with pytest.raises(RuntimeError):
        latency(model, (5, 8, 8), min_run_time=0.02)
    assert model.training


def test_file_sizes(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"12345")
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    assert list(file_sizes(tmp_path).items()) == [("a", 0), ("b", 5)]


def test_weight_bytes_are_nearly_the_file(tmp_path: Path) -> None:
    model = timm.create_model("resnet18").to(torch.bfloat16)
    save_file(model.state_dict(), tmp_path / "a")
    header = int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
    assert weight_bytes(model) + header + 8 == (tmp_path / "a").stat().st_size
    with torch.device("meta"):
        assert weight_bytes(timm.create_model("resnet18").to(torch.bfloat16)) == weight_bytes(model)


def test_weight_bytes_count_shared_tensors_once() -> None:
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    assert weight_bytes(model) == 128
    model[1].weight = model[0].weight
    assert weight_bytes(model) == 64
