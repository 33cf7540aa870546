"""Removed kernels stay removed: through training, saving, loading, copying and DepGraph."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dscore_plugin import plan_pruning
from dscore_plugin.errors import ModelError, PlanError
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.masking import Masks
from dscore_plugin.models import create_model
from dscore_plugin.plan import KernelRemoval, Plan
from dscore_plugin.surgery.kernels import KernelMasked, carry_out, kernel_masks, prune_kernels, remove_masks
from tests.architectures import SMALL, Tied, chain

LAYERS = ("layer1.0.conv1", "layer2.1.conv2", "layer3.0.conv1")


def random_masks(model: nn.Module, layers: tuple[str, ...] = LAYERS, keep: float = 0.2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: model.get_submodule(name).weight.shape[:2] for name in layers}
    return {name: torch.rand(shape, generator=generator) < keep for name, shape in shapes.items()}


def live(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).weight.detach().flatten(2).ne(0).any(dim=2)


def test_masks_survive_training_with_momentum_and_decay() -> None:
    torch.manual_seed(0)
    model, x = create_model("cifar_resnet20"), torch.randn(4, 3, 32, 32)
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    model(x).square().sum().backward()
    optimiser.step()  # momentum of the dense network would move the removed kernels on
    masks = random_masks(model)
    prune_kernels(model, masks)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in masks}
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        model(x).square().sum().backward()
        optimiser.step()
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert not weight.grad.flatten(2).ne(0).any(dim=2)[~mask].any()
        assert torch.equal(live(model, name), mask)
        assert not torch.equal(weight, before[name])  # the others were trained


def test_what_an_optimiser_writes_into_removed_kernels_is_ignored_and_wiped_away() -> None:
    torch.manual_seed(0)
    model, x = create_model("cifar_resnet20").train(), torch.randn(2, 3, 32, 32)
    name = LAYERS[0]
    prune_kernels(model, random_masks(model, (name,)))
    clean = copy.deepcopy(model)
    model.get_submodule(name).weight.data += 1 - kernel_masks(model)[name].float()[..., None, None]
    assert torch.equal(model(x), clean(x))
    assert torch.equal(model.eval()(x), clean.eval()(x))
    assert torch.equal(live(model, name), kernel_masks(model)[name])


def test_state_dicts_and_copies_carry_the_masks() -> None:
    torch.manual_seed(0)
    model, x = create_model("cifar_resnet20").eval(), torch.randn(2, 3, 32, 32)
    prune_kernels(model, random_masks(model))
    twin = copy.deepcopy(model)
    assert kernel_masks(twin).keys() == kernel_masks(model).keys()
    other = create_model("cifar_resnet20").eval()
    prune_kernels(other, {name: torch.ones_like(mask) for name, mask in kernel_masks(model).items()})
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
        assert torch.equal(twin(x), model(x))
        plain = remove_masks(twin)
        assert torch.equal(plain(x), model(x))
    assert not kernel_masks(plain)
    assert type(plain.layer1[0].conv1) is nn.Conv2d


@pytest.mark.parametrize("name", ["mixed", "conv_3d", "groups_of_four_three_and_two"])
def test_removal_equals_masking(name: str) -> None:
    architecture = SMALL[name]
    model = architecture.randomised()
    x = torch.randn(2, *architecture.shape)
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = tuple(n for n, m in model.named_modules() if type(m) in kinds)
    masks = random_masks(model, layers, 0.5)
    places = {layer: (~mask).flatten().nonzero().flatten() for layer, mask in masks.items()}
    with Masks(model) as silenced, torch.no_grad():
        silenced.silence((), places)
        expected = model(x)
    removals = tuple(KernelRemoval(layer, tuple(p.tolist())) for layer, p in places.items())
    plan = Plan.from_dict(Plan("", architecture.shape, removals).to_dict())
    plan.apply(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


def test_depgraph_prunes_masked_networks_and_the_masks_follow() -> None:
    torch.manual_seed(0)
    model, x = create_model("cifar_resnet20").eval(), torch.zeros(1, 3, 32, 32)
    dense = PruningGraph(model, (x,))
    prune_kernels(model, random_masks(model))
    masked = PruningGraph(model, (x,))
    assert [g.name for g in masked.prunable] == [g.name for g in dense.prunable]
    assert masked.costs.dense == dense.costs.dense
    before = kernel_masks(model)["layer2.1.conv2"]
    plan = plan_pruning(model, x, "l1", ratio=0.5)
    gone = plan.removed("layer2.1.conv1")
    plan.apply(model)
    kept = [c for c in range(32) if c not in gone]
    assert torch.equal(kernel_masks(model)["layer2.1.conv2"], before[:, kept])
    assert model(x).shape == (1, 10)


def test_a_second_removal_adds_to_the_first() -> None:
    model = create_model("cifar_resnet20")
    first, second = torch.rand(16, 16) > 0.5, torch.rand(16, 16) > 0.5
    prune_kernels(model, {"layer1.0.conv1": first})
    prune_kernels(model, {"layer1.0.conv1": second})
    assert torch.equal(kernel_masks(model)["layer1.0.conv1"], first & second)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda: {"layer9": torch.ones(1, 1).bool()}, "no layer 'layer9'"),
        (lambda: {"bn1": torch.ones(16, 16).bool()}, "is a BatchNorm2d; kernels leave"),
        (lambda: {"conv1": torch.ones(16, 3)}, "torch.float32"),
        (lambda: {"conv1": torch.ones(3, 16).bool()}, r"expected torch.bool of shape \(16, 3\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(spoil: Callable[[], dict[str, Tensor]], message: str) -> None:
    model = create_model("cifar_resnet20")
    masks = {"layer1.0.conv1": torch.eye(16) > 0, **spoil()}
    with pytest.raises(PlanError, match=message):
        prune_kernels(model, masks)
    assert not kernel_masks(model)


def test_kernels_of_a_weight_that_two_layers_share_are_refused() -> None:
    model = Tied()
    with pytest.raises(PlanError, match="the weight of 'two' is 'one.weight', too; leave 'two' out"):
        prune_kernels(model, {"last": torch.rand(16, 8) < 0.5, "two": torch.eye(8) > 0})
    assert not kernel_masks(model)
    assert model.one.weight is model.two.weight


def test_plans_that_do_not_fit_leave_the_network_as_it_was() -> None:
    model, x = create_model("cifar_resnet20"), (torch.zeros(1, 3, 32, 32),)
    for removals, message in (
        ([KernelRemoval("conv1", (48,))], r"has kernels 0\.\.47; the plan names 48"),
        ([KernelRemoval("conv1", (1,)), KernelRemoval("conv1", (2,))], "twice"),
    ):
        with pytest.raises(PlanError, match=message):
            carry_out(model, x, removals)
    with pytest.raises(ModelError, match="does not run"):
        carry_out(model, (torch.zeros(1, 4, 32, 32),), [KernelRemoval("conv1", (1,))])
    assert not any(isinstance(module, KernelMasked) for module in model.modules())
    assert "conv1.kernel_mask" not in model.state_dict()


def test_meta_models_can_be_masked() -> None:
    with torch.device("meta"):
        model = chain(nn.Conv2d(3, 4, 3), width=4)()
    model = model.to("meta")
    prune_kernels(model, {"body.0": torch.ones(4, 3).bool()})
    assert model.body[0].weight.is_meta
