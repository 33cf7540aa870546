from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dscore_plugin.errors import ModelError
from dscore_plugin.selection.folding import fold_batchnorm
from tests.selection.helpers import forwards_are_their_own, network


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


# A pre-activation network reads most norms' inputs elsewhere too; the others have a norm behind each convolution.
@pytest.mark.parametrize(
    ("name", "left"),
    [("cifar_resnet20", 0), ("mobilenetv2_100", 0), ("densenet121", 62), ("resnetv2_50", 17)],
)
def test_the_function_stays_and_the_norms_go(name: str, left: int) -> None:
    model = network(name)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_batchnorm(model, images)
    others = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual = model(others), folded(others)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert norms(folded) == left < norms(model)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in folded.named_modules()]
    assert forwards_are_their_own(folded)
    assert forwards_are_their_own(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Branching(nn.Module):
    """Reads the convolution's output after, or before, the norm does."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.convolution, self.norm, self.order = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), order
        self.norm.running_mean = torch.rand(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        before = y.sigmoid() if self.order == "before" else 0
        normal = self.norm(y)
        after = y.sigmoid() if self.order == "after" else 0
        again = self.norm(y) if self.order == "again" else 0
        twice = self.convolution(x) if self.order == "twice" else 0
        return normal + before + after + again + twice


@pytest.mark.parametrize(
    ("order", "left"), [("only", 0), ("before", 1), ("after", 1), ("again", 1), ("twice", 1)]
)
def test_a_convolution_that_others_read_is_not_folded(order: str, left: int) -> None:
    model = Branching(order).eval()
    images = torch.randn(2, 3, 6, 6)
    folded = fold_batchnorm(model, images)
    assert norms(folded) == left
    assert torch.allclose(folded(images), model(images), atol=1e-5)


class Shifted(nn.BatchNorm2d):
    """No batch norm, though it looks like one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_folding_that_changes_the_function_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Shifted(4)).eval()
    with pytest.raises(ModelError, match="changes the output of Sequential .* without fold_batchnorm"):
        fold_batchnorm(model, torch.randn(2, 3, 6, 6))
    assert norms(model) == 1
