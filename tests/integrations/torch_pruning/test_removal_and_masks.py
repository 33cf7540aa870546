"""The law of structural pruning: what a mask silences and what a removal takes away give the same outputs."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dscore_plugin.errors import ModelError, PlanError
from dscore_plugin.groups import ChannelGroup
from dscore_plugin.integrations.torch_pruning.counting import count
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.integrations.torch_pruning.removal import remove_channels
from dscore_plugin.masking import masked
from dscore_plugin.plan import ChannelRemoval
from tests.architectures import IMAGE, LARGE, SMALL, UNMAPPABLE, Architecture, Residual, SeveralOutputs, chain

ALL = LARGE | SMALL | UNMAPPABLE
Chosen = list[tuple[ChannelGroup, list[int]]]


def choose(groups: Sequence[ChannelGroup], share: float, seed: int = 0) -> Chosen:
    """Draw at least one unit of each group."""
    draw = random.Random(seed)
    return [(group, draw.sample(range(group.units), max(1, int(share * group.units)))) for group in groups]


def removals(chosen: Chosen) -> list[ChannelRemoval]:
    return [ChannelRemoval(group.name, group.root_channels(units)) for group, units in chosen]


def images(architecture: Architecture, batch: int = 3) -> Tensor:
    return torch.randn(batch, *architecture.shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(model(x)) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", ALL)
def test_removal_is_the_mask_and_costs_what_the_table_says(name: str) -> None:
    architecture = ALL[name]
    model, x = architecture.randomised(), images(architecture)
    graph = PruningGraph(model, architecture.inputs)
    chosen = choose(graph.prunable, 0.4)
    before = outputs(model, x)
    with masked(model, chosen):
        silenced = outputs(model, x)
    assert all(torch.equal(*pair) for pair in zip(before, outputs(model, x), strict=True))
    table, dense = graph.costs, count(model, architecture.inputs)
    assert (round(table.dense.macs), round(table.dense.params)) == dense
    left = table.cost({group.name: len(units) for group, units in chosen})

    remove_channels(model, architecture.inputs, removals(chosen))
    pruned = outputs(model, x)
    for one, other, dense_output in zip(silenced, pruned, before, strict=True):
        assert other.shape == dense_output.shape
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()
    assert count(model, architecture.inputs) == (round(left.macs), round(left.params))
    if chosen:
        assert any(not torch.allclose(*pair, rtol=1e-2) for pair in zip(pruned, before, strict=True))
        assert left.macs < dense[0]


@pytest.mark.parametrize(
    "name", ["cifar_resnet56", "cifar_vgg16_bn", "resnet18", "mobilenetv2_100", "residual"]
)
def test_single_groups_are_the_mask_too(name: str) -> None:
    architecture = ALL[name]
    dense, x = architecture.randomised(1), images(architecture, 2)
    graph = PruningGraph(dense, architecture.inputs)
    for position in (0, -1):
        group = graph.prunable[position]
        chosen = [(group, [0, group.units - 1])]
        with masked(dense, chosen):
            silenced = outputs(dense, x)[0]
        model = remove_channels(copy.deepcopy(dense), architecture.inputs, removals(chosen))
        pruned = outputs(model, x)[0]
        assert (silenced - pruned).abs().max() <= 1e-4 * pruned.abs().max()
        left = graph.costs.cost({group.name: 2})
        assert count(model, architecture.inputs) == (round(left.macs), round(left.params))


@pytest.mark.parametrize("name", ["residual", "shared", "mixed", "flattened", "group_norm"])
def test_a_pruned_network_can_be_pruned_again(name: str) -> None:
    architecture = ALL[name]
    model, x = architecture.randomised(), images(architecture)
    for seed in (0, 1):
        graph = PruningGraph(model, architecture.inputs)
        chosen = choose([group for group in graph.prunable if group.units > 2], 0.3, seed)
        with masked(model, chosen):
            silenced = outputs(model, x)[0]
        remove_channels(model, architecture.inputs, removals(chosen))
        pruned = outputs(model, x)[0]
        assert (silenced - pruned).abs().max() <= 1e-4 * pruned.abs().max()


def test_frozen_parameters_stay_frozen_and_others_trainable() -> None:
    architecture = SMALL["residual"]
    model = architecture.randomised()
    model.conv1.weight.requires_grad_(False)
    model.bn2.bias.requires_grad_(False)
    graph = PruningGraph(model, architecture.inputs)
    remove_channels(model, architecture.inputs, removals(choose(graph.prunable, 0.4)))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "conv1.weight",
        "bn2.bias",
    ]
    assert model.conv1.out_channels == 8
    assert all(p.is_leaf for p in model.parameters())
    model(torch.randn(2, *IMAGE)).sum().backward()
    assert model.stem.weight.grad is not None


def test_a_wholly_frozen_network_is_pruned() -> None:
    architecture = SMALL["residual"]
    model = architecture.randomised().requires_grad_(False)
    remove_channels(model, architecture.inputs, [ChannelRemoval("conv1", (0, 5))])
    assert model.conv1.out_channels == 10
    assert not any(p.requires_grad for p in model.parameters())


class Stubborn(Residual):
    """Runs at full width only."""

    def forward(self, x: Tensor) -> Tensor:
        if self.conv1.out_channels != 12:
            raise RuntimeError("twelve channels, or none")
        return super().forward(x)


def test_a_network_that_does_not_run_afterwards_is_as_it_was() -> None:
    torch.manual_seed(0)
    model = Stubborn().train()
    model.bn1.eval()
    model.fc.weight.requires_grad_(False)
    x = torch.randn(2, *IMAGE)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    objects = [id(p) for p in model.parameters()]
    attributes = {name: (m.training, str(m)) for name, m in model.named_modules()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ModelError, match="twelve channels, or none"):
        remove_channels(model, (x,), [ChannelRemoval("conv1", (1, 2)), ChannelRemoval("conv2", (3,))])
    assert [id(p) for p in model.parameters()] == objects
    assert {name: (m.training, str(m)) for name, m in model.named_modules()} == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model.fc.weight.requires_grad
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model.stem.weight, state["stem.weight"])


def test_an_interrupt_half_way_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = SMALL["residual"]
    model, x = architecture.randomised(), images(architecture)
    before = outputs(model, x)[0]

    chosen = removals(choose(PruningGraph(model, architecture.inputs).prunable, 0.4))
    monkeypatch.setattr(Residual, "forward", forward := _interrupting(Residual.forward))
    with pytest.raises(KeyboardInterrupt):
        remove_channels(model, architecture.inputs, chosen)
    monkeypatch.undo()
    assert forward.calls == 2
    assert torch.equal(outputs(model, x)[0], before)


class _interrupting:  # noqa: N801
    """A forward() that is traced once and interrupted at the second call."""

    def __init__(self, forward: object) -> None:
        self.forward, self.calls = forward, 0

    def __get__(self, module: nn.Module, kind: type) -> object:
        def run(x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return self.forward(module, x)  # type: ignore[operator]

        return run


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([ChannelRemoval("conv9", (0,))], "no group of channels named 'conv9'"),
        (
            [ChannelRemoval("stem", (0,))],
            "no group of channels named 'stem'",
        ),  # conv2 is the root of its group
        ([ChannelRemoval("fc", (0,))], "must not be pruned: its channels are an output"),
        ([ChannelRemoval("conv1", (0, 12))], r"channels 0..11; the plan names 0..12"),
        ([ChannelRemoval("conv1", (-1, 3))], r"channels 0..11; the plan names -1..3"),
        ([ChannelRemoval("conv1", tuple(range(12)))], "removes all 12 channels of 'conv1'"),
        ([ChannelRemoval("conv1", (1,)), ChannelRemoval("conv1", (2,))], "names 'conv1' twice"),
    ],
)
def test_removals_that_do_not_fit_are_refused_before_anything_changes(
    wrong: list[ChannelRemoval], message: str
) -> None:
    architecture = SMALL["residual"]
    model = architecture.randomised()
    before = outputs(model, images(architecture))[0]
    with pytest.raises(PlanError, match=message):
        remove_channels(model, architecture.inputs, [ChannelRemoval("conv2", (0,)), *wrong])
    assert torch.equal(outputs(model, images(architecture))[0], before)
    assert model.conv2.out_channels == 8


def test_half_a_unit_of_a_grouped_layer_is_refused() -> None:
    architecture = SMALL["mixed"]
    with pytest.raises(PlanError, match=r"sets of 4: c, c \+ 4, ... must be listed together"):
        remove_channels(architecture.randomised(), architecture.inputs, [ChannelRemoval("stem", (0, 4, 8))])


def test_a_removal_of_nothing_changes_nothing() -> None:
    architecture = SMALL["residual"]
    model = architecture.randomised()
    before = outputs(model, images(architecture))[0]
    remove_channels(model, architecture.inputs, [ChannelRemoval("conv1", ())])
    assert torch.equal(outputs(model, images(architecture))[0], before)


def test_every_output_keeps_its_width() -> None:
    model = SeveralOutputs().eval()
    x = (torch.zeros(1, *IMAGE),)
    graph = PruningGraph(model, x)
    remove_channels(model, x, removals(choose(graph.prunable, 0.5)))
    result = model(torch.randn(2, *IMAGE))
    assert result["features"][0].shape[1] == 6
    assert result["logits"].shape == (2, 4)
    assert model.conv1.out_channels == 4
    assert model.conv3.out_channels == 3


@pytest.mark.parametrize("options", [{"num_classes": 0}, {"features_only": True}])
def test_embeddings_and_feature_maps_keep_their_width(options: dict[str, object]) -> None:
    import timm

    model = timm.create_model("resnet18", **options).eval()
    x = (torch.randn(1, 3, 32, 32),)
    shapes = [tuple(leaf.shape) for leaf in outputs(model, x[0])]
    graph = PruningGraph(model, x)
    remove_channels(model, x, removals(choose(graph.prunable, 0.5)))
    assert [tuple(leaf.shape) for leaf in outputs(model, x[0])] == shapes
    assert len(graph.prunable) >= 8


def test_the_trunk_is_pruned_where_the_shortcut_is_a_convolution() -> None:
    from dscore_plugin.models import create_model
    from tests.architectures import randomised

    torch.manual_seed(0)
    model = randomised(create_model("cifar_resnet20", shortcut="conv")).eval()
    x = torch.randn(2, 3, 32, 32)
    graph = PruningGraph(model, (x[:1],))
    assert [group.name for group in graph.groups if group.protected] == ["linear"]
    chosen = choose(graph.prunable, 0.4)
    with masked(model, chosen):
        silenced = outputs(model, x)[0]
    remove_channels(model, (x[:1],), removals(chosen))
    assert model.conv1.out_channels < 16
    pruned = outputs(model, x)[0]
    assert (silenced - pruned).abs().max() <= 1e-4 * pruned.abs().max()


def test_what_is_left_can_still_be_trained() -> None:
    model = chain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), width=6)()
    remove_channels(model, (torch.zeros(1, *IMAGE),), [ChannelRemoval("body.0", (0, 1, 2))])
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.body[0].weight.detach().clone()
    model(torch.randn(4, *IMAGE)).square().sum().backward()
    optimizer.step()
    assert before.shape == (5, 3, 3, 3)
    assert not torch.equal(before, model.body[0].weight)
