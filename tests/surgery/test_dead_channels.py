"""Dead channels leave, and the outputs stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.models import create_model
from dscore_plugin.surgery.dead_channels import remove_dead_channels
from dscore_plugin.surgery.kernels import KernelMasked, can_be_masked, prune_kernels
from tests.architectures import LARGE, SMALL, chain, randomised

NAMES = [
    "residual", "mixed", "squeezed", "flattened", "groups_of_four_three_and_two", "depthwise_multiplier", "bn_free",
    "concatenated_twice", "group_norm", "conv_3d",
]  # fmt: skip


def groups_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple:
    return PruningGraph(model, inputs).prunable


@pytest.mark.parametrize("name", [*NAMES, "resnet18"])
def test_outputs_stay(name: str) -> None:
    architecture = {**SMALL, **LARGE}[name]
    model = architecture.randomised()
    generator = torch.Generator().manual_seed(0)
    shapes = {n: m.weight.shape[:2] for n, m in model.named_modules() if can_be_masked(m)}
    prune_kernels(model, {n: torch.rand(shape, generator=generator) < 0.12 for n, shape in shapes.items()})
    x, before = torch.randn(2, *architecture.shape), sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        expected = model(x)
        plan = remove_dead_channels(model, architecture.inputs, groups_of(model, architecture.inputs))
        torch.testing.assert_close(model(x), expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    assert (sum(p.numel() for p in model.parameters()) < before) == bool(plan.removals)
    for module in model.modules():
        if isinstance(module, KernelMasked):
            assert torch.equal(module.weight.flatten(2).ne(0).any(dim=2), module.kernel_mask)


def network(beta: float, padding: int, bias: bool) -> nn.Module:
    """Two convolutions; filter 2 of the first is dead, so that its channel is relu(beta) at every pixel."""
    model = randomised(
        chain(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 5, 3, padding=padding, bias=bias), nn.BatchNorm2d(5), nn.ReLU(), width=5,
        )()
    ).eval()  # fmt: skip
    keep = torch.ones(4, 3, dtype=torch.bool)
    keep[2] = False
    norm = model.body[1]
    norm.weight.data[2], norm.running_mean[2], norm.bias.data[2] = 1.0, 0.0, beta
    return prune_kernels(model, {"body.0": keep})


@pytest.mark.parametrize(
    ("beta", "padding", "bias", "leaves"),
    [
        (-0.7, 1, False, True),  # relu makes it zero, at the border, too
        (0.7, 0, True, True),  # into the bias
        (0.7, 0, False, True),  # into the running mean of the norm behind
        (0.7, 1, True, False),  # the zeros around the image differ from the constant
    ],
)
def test_a_constant_is_folded_where_that_is_exact(
    beta: float, padding: int, bias: bool, leaves: bool
) -> None:
    model = network(beta, padding, bias)
    x = torch.randn(4, 3, 9, 9)
    with torch.no_grad():
        expected = model(x)
        plan = remove_dead_channels(model, (x[:1],), groups_of(model, (x[:1],)))
        torch.testing.assert_close(model(x), expected)
    assert plan.removed("body.0") == ((2,) if leaves else ())
    assert model.body[0].out_channels == (3 if leaves else 4)


def test_an_unread_channel_takes_those_that_only_it_reads_with_it() -> None:
    model = randomised(
        chain(
            nn.Conv2d(3, 4, 3),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.ReLU(),
            nn.Conv2d(4, 5, 3),
            nn.ReLU(),
            width=5,
        )()
    ).eval()
    middle = torch.eye(4) > 0  # channel c of the second reads channel c of the first alone
    last = torch.ones(5, 4, dtype=torch.bool)
    last[:, 1] = False
    prune_kernels(model, {"body.2": middle, "body.4": last})
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        expected = model(x)
        plan = remove_dead_channels(model, (x,), groups_of(model, (x,)))
        torch.testing.assert_close(model(x), expected)
    assert (plan.removed("body.0"), plan.removed("body.2")) == ((1,), (1,))


def test_nothing_dead_nothing_leaves() -> None:
    model = create_model("cifar_resnet20").eval()
    x = (torch.zeros(1, 3, 32, 32),)
    assert remove_dead_channels(model, x, groups_of(model, x)).removals == ()
