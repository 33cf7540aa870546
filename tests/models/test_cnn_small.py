"""Coarse pruning's small network against its definition, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dscore_plugin.errors import ModelError
from dscore_plugin.models import create_model
from tests.selection.helpers import network


def by_definition(state: dict[str, Tensor], x: Tensor) -> Tensor:
    def norm(name: str, x: Tensor) -> Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, variance, scale, shift = (
            state[f"{name}.{key}"].view(1, -1, *[1] * (x.ndim - 2)) for key in keys
        )
        return functional.relu((x - mean) / torch.sqrt(variance + 1e-5) * scale + shift)

    for convolution, behind in ((0, 1), (3, 4), (7, 8), (10, 11), (14, 15), (17, 18)):
        if convolution in (7, 14):  # windows of 3 at every second place; those at the edge are cut off
            padded = functional.pad(x, (0, 1, 0, 1), value=float("-inf"))
            x = torch.stack([padded[..., i:, j:][..., ::2, ::2][..., : x.shape[2] // 2, : x.shape[3] // 2]
                             for i in range(3) for j in range(3)]).amax(0)  # fmt: skip
        x = norm(
            f"features.{behind}", functional.conv2d(x, state[f"features.{convolution}.weight"], padding=1)
        )
    x = norm("hidden.1", x.reshape(len(x), -1) @ state["hidden.0.weight"].T)
    return x @ state["classifier.weight"].T + state["classifier.bias"]


def test_it_computes_what_the_paper_says() -> None:
    model = network("cifar_cnn_small").double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.allclose(model(x), by_definition(model.state_dict(), x))


def test_sizes() -> None:
    model = create_model("cifar_cnn_small")
    convolutions = 9 * (3 * 128 + 3 * 128 * 128 + 128 * 256 + 256 * 256)
    norms, linear = 2 * (4 * 128 + 3 * 256), 256 * 8 * 8 * 256 + 256 * 10 + 10
    assert sum(p.numel() for p in model.parameters()) == convolutions + norms + linear == 5_529_994
    assert model.eval().forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 256, 8, 8)


@pytest.mark.parametrize("size", [4, 8, 28, 31, 33])
def test_other_sizes_of_images(size: int) -> None:
    if size < 8:
        with pytest.raises(ModelError, match="at least 8"):
            create_model("cifar_cnn_small", image_size=size)
    else:
        assert create_model("cifar_cnn_small", image_size=size).eval()(
            torch.zeros(2, 3, size, size)
        ).shape == (2, 10)


def test_without_classes_it_gives_the_embedding() -> None:
    assert create_model("cifar_cnn_small", num_classes=0).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 256)
