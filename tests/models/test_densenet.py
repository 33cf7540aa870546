"""The dense networks against their definition, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dscore_plugin.errors import ModelError
from dscore_plugin.models import create_model
from dscore_plugin.models.cifar_densenet import CifarDenseNet


@pytest.mark.parametrize(
    ("name", "size"), [("cifar_densenet40", 1_019_722), ("cifar_densenet100_k12", 769_162)]
)
def test_sizes_are_those_of_the_paper(name, size):
    model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == size  # the paper's table: 1.0 M and 0.8 M
    assert create_model(name, num_classes=100, in_chans=1)(torch.zeros(2, 1, 32, 32)).shape == (2, 100)


def by_definition(state: dict[str, Tensor], x: Tensor, layers: int, bottleneck: bool) -> Tensor:
    def norm(name: str, x: Tensor) -> Tensor:
        mean, variance, scale, shift = (
            state[f"{name}.{key}"].view(1, -1, 1, 1)
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.relu((x - mean) / torch.sqrt(variance + 1e-5) * scale + shift)

    x = functional.conv2d(x, state["conv1.weight"], padding=1)
    for block in (1, 2, 3):
        for layer in range(layers):
            name = f"block{block}.{layer}"
            y = norm(f"{name}.norm1", x)
            if bottleneck:
                y = norm(f"{name}.norm2", functional.conv2d(y, state[f"{name}.conv1.weight"]))
            x = torch.cat([x, functional.conv2d(y, state[f"{name}.conv2.weight"], padding=1)], dim=1)
        if block < 3:
            x = norm(f"transition{block}.norm", x)
            x = functional.avg_pool2d(functional.conv2d(x, state[f"transition{block}.conv.weight"]), 2)
    return norm("norm", x).mean(dim=(2, 3)) @ state["classifier.weight"].T + state["classifier.bias"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("depth", "bottleneck", "widths"), [(13, False, (52, 88, 124)), (22, True, (60, 66, 69))]
)
def test_outputs_are_those_of_the_definition(depth, bottleneck, widths):
    torch.manual_seed(0)
    model = CifarDenseNet(depth, bottleneck=bottleneck).eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("mean", "var")):
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    x = torch.randn(2, 3, 16, 16)
    norms = [model.transition1.norm, model.transition2.norm, model.norm]
    assert tuple(norm.num_features for norm in norms) == widths
    torch.testing.assert_close(
        model(x), by_definition(model.state_dict(), x, 3, bottleneck), rtol=1e-4, atol=1e-5
    )
    assert model.forward_features(x).shape == (2, widths[-1], 4, 4)


@pytest.mark.parametrize(
    "arguments", [{"depth": 41}, {"depth": 4}, {"depth": 41, "bottleneck": False}, {"depth": 40, "growth": 0}]
)
def test_sizes_that_do_not_exist(arguments):
    with pytest.raises(ModelError, match="growth is 0" if "growth" in arguments else "is not of the form"):
        CifarDenseNet(**arguments)
