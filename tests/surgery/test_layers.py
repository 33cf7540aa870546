"""Removing a branch is bypassing it, on every family; what is left can be pruned, trained and loaded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin import load_pruned, plan_pruning, save_pruned
from dscore_plugin.errors import ModelError, PlanError
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.models import create_model
from dscore_plugin.plan import LayerRemoval, Plan
from dscore_plugin.surgery.layers import (
    RULES,
    Rule,
    bypass,
    carry_out,
    find_branches,
    remove_branches,
    removed_branches,
)
from tests.architectures import randomised

# name -> arguments, branches, blocks and dense layers in all
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "cifar_resnet20": ({}, 9),
    "cifar_preresnet20": ({}, 6),
    "cifar_densenet40": ({}, 36),
    "cifar_densenet100_k12": ({}, 48),
    "resnet18": ({}, 8),
    "resnet26": ({}, 8),
    "seresnext26t_32x4d": ({}, 8),
    "resnext50_32x4d": ({}, 16),
    "resnetv2_18": ({}, 8),
    "resnetv2_50x1_bit": ({}, 16),
    "resnetv2_50": ({"preact": False}, 16),
    "regnetx_002": ({}, 13),
    "regnetv_040": ({}, 22),
    "mobilenetv2_100": ({}, 10),
    "efficientnet_b0": ({}, 9),
    "convnext_atto": ({}, 12),
    "vit_tiny_patch16_224": ({"img_size": 32, "depth": 3}, 6),
    "deit_tiny_distilled_patch16_224": ({"img_size": 32, "depth": 2}, 4),
    "densenet121": ({}, 58),
}


def build(name: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    arguments = {**FAMILIES.get(name, ({}, 0))[0], **arguments}
    return randomised(create_model(name, num_classes=10, **arguments)).eval()


def image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def bypassed(model: nn.Module, names: list[str], x: Tensor) -> Tensor:
    """The outputs when what the branches add is zero."""
    outputs = {branch.name: branch.output for branch in find_branches(model)}
    with ExitStack() as stack, torch.no_grad():
        for name in names:
            module = model.get_submodule(outputs[name])
            stack.callback(module.register_forward_hook(lambda _, __, out: torch.zeros_like(out)).remove)
        return model(x)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_removed_branch_is_a_bypassed_one(name):
    model, x = build(name), image()
    branches = [branch.name for branch in find_branches(model)]
    assert len(branches) == FAMILIES[name][1]
    before, sizes = model(x), sum(p.numel() for p in model.parameters())
    for part in (branches[::2], branches[1::2]):  # in the end all of them
        expected = bypassed(model, part, x)
        remove_branches(model, part)
        assert (model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert set(part) <= set(removed_branches(model))
        assert (expected - before).abs().max() > 1e-3 * before.abs().max()
        before = expected
    assert find_branches(model) == ()
    assert sum(p.numel() for p in model.parameters()) < 0.8 * sizes


def relu_of_shortcut(block: Any, x: Tensor) -> Tensor:
    return functional.relu(x if block.downsample is None else block.downsample(x))


@torch.no_grad()
def test_what_is_left_of_a_block_by_hand():
    x = torch.randn(2, 64, 8, 8)
    for stage, width in (("layer1.1", 64), ("layer2.0", 128)):
        model = build("resnet18")
        block = model.get_submodule(stage)
        remove_branches(model, [stage])
        left = model.get_submodule(stage)
        assert torch.equal(left(x), relu_of_shortcut(block, x))
        assert left(x).shape[1] == width
    model = build("cifar_resnet20")
    remove_branches(model, ["layer2.0"])
    x = torch.randn(2, 16, 8, 8)
    expected = torch.cat([torch.zeros(2, 8, 4, 4), x[:, :, ::2, ::2].relu(), torch.zeros(2, 8, 4, 4)], dim=1)
    assert torch.equal(model.layer2[0](x), expected)
    model = build("resnetv2_18")
    block = model.stages[1].blocks[0]
    remove_branches(model, ["stages.1.blocks.0", "stages.1.blocks.1"])
    x = torch.randn(2, 64, 8, 8)
    assert torch.equal(model.stages[1].blocks[0](x), block.downsample(block.norm1(x)))
    assert torch.equal(model.stages[1].blocks[1](x), x)


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20", "vit_tiny_patch16_224", "densenet121"])
def test_what_is_left_can_be_trained(name):
    model = build(name)
    remove_branches(model, [branch.name for branch in find_branches(model)][1:4])
    model.train()
    model(
        image()
    ).square().mean().backward()  # activations that work in place would spoil a neighbour's output
    assert all(p.grad is not None for name, p in model.named_parameters() if "head_dist" not in name)


def test_parameters_keep_their_names_and_modules_their_modes():
    model = build("resnet18")
    dense = set(model.state_dict())
    model.train()
    model.layer3.eval()
    remove_branches(model, ["layer2.0", "layer3.1"])
    lost = dense - set(model.state_dict())
    assert set(model.state_dict()) <= dense
    assert {name.rpartition(".")[0].rpartition(".")[0] for name in lost} == {"layer2.0", "layer3.1"}
    assert not any("downsample" in name for name in lost)
    assert model.layer2[0].training
    assert not model.layer3[1].training


@pytest.mark.parametrize("name", FAMILIES)
def test_the_meta_device_gives_the_same_structure(name):
    model = build(name)
    names = [branch.name for branch in find_branches(model)][::2]
    remove_branches(model, names)
    with torch.device("meta"):
        dense = create_model(name, num_classes=10, **FAMILIES[name][0])
    remove_branches(dense, removed_branches(model))
    found, expected = dense.state_dict(), model.state_dict()
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in expected.items()
    }
    assert [type(m) for m in dense.modules()] == [type(m) for m in model.modules()]


# Together with the removal of channels ----------------------------------------------------------------------

PRUNED: dict[str, Callable[[], nn.Module]] = {
    "cifar_resnet20": partial(build, "cifar_resnet20"),
    "cifar_resnet20 with a trunk that can be pruned": partial(build, "cifar_resnet20", shortcut="conv"),
    "resnet18": partial(build, "resnet18"),
    "mobilenetv2_100": partial(build, "mobilenetv2_100"),
    "vit_tiny_patch16_224": partial(build, "vit_tiny_patch16_224"),
    "cifar_densenet22": lambda: randomised(
        timm.create_model("cifar_densenet100_k12").__class__(22), 0
    ).eval(),
}


@torch.no_grad()
@pytest.mark.parametrize("name", PRUNED)
def test_channels_leave_before_and_after_branches(name):
    x = image()
    first, second = PRUNED[name](), PRUNED[name]()
    names = [branch.name for branch in find_branches(first)][::2]

    remove_branches(first, names)
    plan = plan_pruning(first, x[:1], "l1", ratio=0.4)
    plan.apply(first, (x[:1],))
    assert plan.macs[1] < 0.9 * plan.macs[0]

    plan_pruning(second, x[:1], "l1", ratio=0.4).apply(second, (x[:1],))
    expected = bypassed(second, names, x)
    remove_branches(second, names)
    assert (second(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    PruningGraph(second, (x[:1],))

    for model in (first, second):
        assert model(x).shape == (2, 10)
        assert torch.isfinite(model(x)).all()
        assert removed_branches(model) == names


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_saved_and_loaded_it_is_the_same_to_the_bit(name, tmp_path):
    model, x = build(name), image()
    names = [branch.name for branch in find_branches(model)][::2]
    remove_branches(model, names)
    if name in ("resnet18", "cifar_resnet20", "mobilenetv2_100"):
        plan_pruning(model, x[:1], "l1", ratio=0.3).apply(model, (x[:1],))
    arguments = {"num_classes": 10, **FAMILIES[name][0]}
    save_pruned(
        model, tmp_path / "artifact", architecture=name, model_args=arguments, input_shape=(3, 32, 32)
    )
    loaded = load_pruned(tmp_path / "artifact")
    assert removed_branches(loaded) == removed_branches(model)
    assert torch.equal(loaded(x), model(x))


def test_a_plan_of_layers():
    model, x = build("resnet18"), image()
    plan = Plan("", (3, 32, 32), (LayerRemoval("layer1.0"), LayerRemoval("layer4.1")))
    expected = bypassed(model, ["layer1.0", "layer4.1"], x)
    plan.apply(model)
    assert removed_branches(model) == ["layer1.0", "layer4.1"]
    assert torch.allclose(model(x), expected, rtol=1e-5)


# What cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["layer1.0", "layer1.0"], "'layer1.0' twice"),
        (["layer1.0", "layer2.1"], "'layer2.1' has been removed already"),
        (["layer1.00"], "'layer1.00' is no residual branch of ResNet; did you mean 'layer1.0'"),
        (["conv1"], "lists 7 of them"),
    ],
)
def test_names_that_do_not_fit(names, message):
    model = build("resnet18")
    remove_branches(model, ["layer2.1"])
    with pytest.raises(PlanError, match=message):
        remove_branches(model, names)
    assert removed_branches(model) == ["layer2.1"]


def test_a_network_that_does_not_run_is_as_it_was():
    model = build("resnet18")
    with pytest.raises(ModelError, match="does not run after the removal of layers"):
        carry_out(model, (torch.zeros(1, 5, 32, 32),), [LayerRemoval("layer1.0")])
    assert removed_branches(model) == []
    assert len(find_branches(model)) == 8


class Changed(timm.models.resnet.BasicBlock):
    """A block whose forward() is another: nobody knows what stays of it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Own(nn.Module):
    def __init__(self, skip: bool = True) -> None:
        super().__init__()
        self.body, self.skip = nn.Linear(4, 4), skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skip else self.body(x)


def test_only_blocks_with_a_known_forward_and_a_shortcut_have_branches():
    assert find_branches(nn.Sequential(Changed(8, 8))) == ()
    assert find_branches(create_model("vgg11")) == ()
    assert [branch.name for branch in find_branches(build("mobilenetv2_100"))][:2] == [
        "blocks.1.1",
        "blocks.2.1",
    ]
    assert find_branches(timm.models.resnet.BasicBlock(8, 8)) == ()  # nothing around it


def test_rules_for_own_blocks():
    rules = {**RULES, f"{Own.__module__}.Own": (Rule(("body",), bypass(only_if="skip")),)}
    model = nn.Sequential(Own(), Own(skip=False), Own())
    assert [(b.name, b.output) for b in find_branches(model, rules)] == [("0", "0.body"), ("2", "2.body")]
    x = torch.randn(3, 4)
    expected = model[1](x)
    remove_branches(model, ["0", "2"], rules)
    assert torch.equal(model(x), expected)
