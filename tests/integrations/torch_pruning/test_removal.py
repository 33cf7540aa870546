"""The law of structural pruning: removing channels gives the same outputs as masking them."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from dscore_plugin.integrations.torch_pruning.counting import count
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.masking import masked
from dscore_plugin.models import create_model
from dscore_plugin.plan import Plan
from dscore_plugin.planning import plan_pruning
from torch import Tensor, nn


class Toy(nn.Module):
    """Grouped, transposed and 1-d convolutions, with norms, and a linear layer behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.norm2 = nn.BatchNorm2d(24)
        self.up = nn.ConvTranspose2d(24, 12, 2, stride=2)
        self.norm3 = nn.BatchNorm2d(12)
        self.line = nn.Conv1d(12, 10, 3, padding=1)
        self.norm4 = nn.BatchNorm1d(10)
        self.hidden = nn.Linear(10 * 256, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.stem(x)))
        x = torch.relu(self.norm2(self.grouped(x)))
        x = torch.relu(self.norm3(self.up(x)))
        x = torch.relu(self.norm4(self.line(x.flatten(2))))
        return self.head(torch.relu(self.hidden(x.flatten(1))))


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "toy":
        return Toy(), torch.randn(2, 3, 8, 8)
    if name.startswith("cifar"):
        options = {"shortcut": "conv"} if name == "cifar_resnet20" else {}
        return create_model(name, **options), torch.randn(2, 3, 32, 32)
    size = 32 if name == "vgg11_bn" else 64  # DepGraph is slow on VGG's flatten
    return timm.create_model(name, num_classes=10), torch.randn(2, 3, size, size)


def randomise(model: nn.Module) -> nn.Module:
    """Fresh networks hide errors behind zeros: give norms scales of both signs, shifts and statistics."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Conv2d | nn.Conv1d | nn.ConvTranspose2d | nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()


NAMES = [
    "toy",
    "cifar_resnet56",
    "cifar_resnet20",  # with convolutional shortcuts: the trunk too
    "cifar_vgg16_bn",
    "resnet18",
    "mobilenetv2_100",
    "vgg11_bn",
    "densenet121",
]


@pytest.mark.parametrize("name", NAMES)
def test_removal_equals_masking_and_costs_what_the_table_says(name: str) -> None:
    model, x = build(name)
    randomise(model)
    dense_macs = count(model, (x[:1],))[0]
    plan = plan_pruning(model, x[:1], "d_score", target_macs=0.5)
    groups = {group.name: group for group in PruningGraph(model, (x[:1],)).groups}
    silenced = [(groups[r.layer], groups[r.layer].units_of(r.channels)) for r in plan.removals]
    reread = Plan.from_dict(plan.to_dict()).apply(copy.deepcopy(model), (x[:1],))
    with torch.inference_mode():
        with masked(model, silenced):
            expected = model(x)
        dense = model(x)
    plan.apply(model, (x[:1],))
    with torch.inference_mode():
        pruned, again = model(x), reread(x)
    scale = expected.abs().max()
    assert (pruned - expected).abs().max() <= 1e-4 * scale
    assert torch.equal(pruned, again)
    assert (dense - expected).abs().max() > 1e-2 * scale  # something was removed that matters
    assert plan.macs[0] == dense_macs
    assert count(model, (x[:1],)) == (plan.macs[1], plan.params[1])
    assert (0.45 if name == "toy" else 0.49) <= plan.macs[1] / plan.macs[0] <= 0.5  # the toy's channels are coarse


def test_the_trunk_of_padded_shortcuts_stays() -> None:
    model = create_model("cifar_resnet20")
    graph = PruningGraph(model, (torch.zeros(1, 3, 32, 32),))
    prunable = {group.name for group in graph.prunable}
    assert prunable == {f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)}
