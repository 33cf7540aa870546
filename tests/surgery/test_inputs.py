"""Removing the inputs of a block: same outputs as masking them, planned, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dscore_plugin import load_pruned, save_pruned
from dscore_plugin.errors import ModelError, PlanError
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.integrations.torch_pruning.links import scored_layers
from dscore_plugin.masking import masked
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.plan import ChannelRemoval, InputRemoval, LayerRow, Plan, fingerprint
from dscore_plugin.surgery.inputs import ChannelSelection, input_groups, remove_inputs

IMAGE = torch.zeros(1, 3, 32, 32)
REMOVALS = (
    InputRemoval("layer1.0.select", (0, 15)),
    ChannelRemoval("layer1.0.conv1", (3,)),
    InputRemoval("layer2.1.select", tuple(range(0, 128, 2))),
    ChannelRemoval("layer2.1.conv2", (0, 1, 31)),
)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = create_model("cifar_preresnet20")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def plan(*removals: ChannelRemoval | InputRemoval, model: nn.Module | None = None) -> Plan:
    return Plan(fingerprint(model) if model else "", (3, 32, 32), removals)


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def test_removal_gives_what_masking_gives():
    model, images = network(), torch.randn(2, 3, 32, 32)
    groups = {g.name: g for g in (*PruningGraph(model, (IMAGE,)).groups, *input_groups(model, (IMAGE,)))}
    with masked(model, [(groups[r.layer], r.channels) for r in REMOVALS]):
        expected = outputs(model, images)
    assert not torch.allclose(expected, outputs(model, images))
    plan(*REMOVALS, model=model).apply(model)
    difference = (outputs(model, images) - expected).abs().max()
    assert difference <= 1e-4 * expected.abs().max()


def test_the_residual_stream_and_the_first_norm_keep_their_width():
    model = plan(*REMOVALS).apply(network())
    block = model.layer2[1]
    assert block.bn1.num_features == 128
    assert (block.conv1.in_channels, block.conv1.out_channels) == (64, 32)
    assert block.conv1.weight.shape == (32, 64, 1, 1)
    assert block.select.selected.tolist() == list(range(1, 128, 2))
    assert (block.conv2.out_channels, block.conv3.in_channels, block.conv3.out_channels) == (29, 29, 128)


def test_an_unused_selection_changes_nothing_and_is_not_in_the_state():
    x = torch.randn(2, 5, 3, 3)
    selection = ChannelSelection()
    assert selection(x) is x
    assert selection.state_dict() == {}
    selection.selected = torch.tensor([4, 1])
    assert torch.equal(selection(x), x[:, [4, 1]])


def test_the_groups_are_the_blocks_inputs():
    model = network()
    groups = input_groups(model, (IMAGE,))
    widths = {
        "layer1.0": 16,
        "layer1.1": 64,
        "layer2.0": 64,
        "layer2.1": 128,
        "layer3.0": 128,
        "layer3.1": 256,
    }
    assert {g.name: (g.channels, [m.module for m in g.members]) for g in groups} == {
        f"{block}.select": (width, [f"{block}.conv1"]) for block, width in widths.items()
    }
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_the_paper_scores_in_a_pre_activation_network():
    model = network()
    found = scored_layers(PruningGraph(model, (IMAGE,)))
    pairs = {(layer.norm, layer.consumers) for layer in found}
    assert pairs == {
        (f"layer{stage}.{block}.bn{n}", (f"layer{stage}.{block}.conv{n}",))
        for stage in (1, 2, 3)
        for block in (0, 1)
        for n in (1, 2, 3)
    }


def test_a_selected_stream_is_protected_and_the_rest_can_be_pruned_again():
    model, images = plan(*REMOVALS).apply(network()), torch.randn(2, 3, 32, 32)
    graph = PruningGraph(model, (IMAGE,))
    stream = next(g for g in graph.groups if any(m.module == "layer2.1.bn1" for m in g.members))
    assert "layer2.1.select" in stream.protected
    groups = {g.name: g for g in (*graph.groups, *input_groups(model, (IMAGE,)))}
    assert "layer2.1.select" not in groups
    again = (ChannelRemoval("layer2.1.conv1", (0, 7)), InputRemoval("layer3.1.select", (5,)))
    with masked(model, [(groups[r.layer], r.channels) for r in again]):
        expected = outputs(model, images)
    plan(*again).apply(model)
    assert (outputs(model, images) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_an_artifact_brings_the_selection_back_bit_by_bit(tmp_path: Path):
    model, images = network(), torch.randn(2, 3, 32, 32)
    chosen = plan(*REMOVALS, model=model)
    chosen.apply(model)
    save_pruned(model, tmp_path / "pruned", architecture="cifar_preresnet20", plan=chosen.to_dict())
    loaded = load_pruned(tmp_path / "pruned")
    assert loaded.layer2[1].select.selected.dtype == torch.int64
    assert torch.equal(outputs(loaded, images), outputs(model, images))
    custom = save_pruned(model, tmp_path / "custom", architecture="custom")
    assert torch.equal(outputs(load_pruned(custom, network(1)), images), outputs(model, images))


def test_dense_weights_load_strictly(tmp_path: Path):
    from safetensors.torch import save_file

    model, images = network(), torch.randn(2, 3, 32, 32)
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    again = network(1)
    load_weights(again, tmp_path / "dense.safetensors")
    assert torch.equal(outputs(again, images), outputs(model, images))


@pytest.mark.parametrize(
    ("removals", "message"),
    [
        ((InputRemoval("layer1.0.conv1", (0,)),), "no channel selection"),
        ((InputRemoval("layer1.0.select", (16,)),), r"has channels 0\.\.15"),
        ((InputRemoval("layer1.0.select", tuple(range(16))),), "all 16 channels"),
        (
            (InputRemoval("layer2.0.select", (1,)), ChannelRemoval("layer1.1.conv3", (1,))),
            "must not be pruned.*layer2.0.select",
        ),
        ((InputRemoval("layer2.0.select", (1,)), ChannelRemoval("nowhere", (1,))), "no group of channels"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_the_network_as_it_was(removals, message):
    model, images = network(), torch.randn(1, 3, 32, 32)
    before = outputs(model, images)
    with pytest.raises(PlanError, match=message):
        plan(*removals).apply(model)
    assert torch.equal(outputs(model, images), before)
    assert all(not len(m.selected) for m in model.modules() if isinstance(m, ChannelSelection))


def test_only_plain_layers_can_stand_behind_a_selection():
    grouped = nn.Sequential(ChannelSelection(), nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(ModelError, match="without groups"):
        input_groups(grouped, (torch.zeros(1, 4, 2, 2),))
    normed = nn.Sequential(ChannelSelection(), nn.BatchNorm2d(4))
    with pytest.raises(ModelError, match="expected convolutions"):
        input_groups(normed, (torch.zeros(1, 4, 2, 2),))
    tied = nn.Sequential(ChannelSelection(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    tied[2].weight = tied[1].weight
    with pytest.raises(ModelError, match="'1.weight' behind the channel selection '0' is '2.weight', too"):
        input_groups(tied, (torch.zeros(1, 4, 2, 2),))


def test_a_linear_layer_and_several_readers_lose_the_same_inputs():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.select, self.left, self.right = ChannelSelection(), nn.Linear(6, 2), nn.Linear(6, 3)
            self.left.weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.select(x)
            return torch.cat([self.left(x), self.right(x)], dim=1)

    model, x = Net().train(), torch.randn(2, 6)
    (group,) = input_groups(model, (x,))
    assert [member.module for member in group.members] == ["left", "right"]
    assert model.training
    with masked(model, [(group, [0, 4])]):
        expected = outputs(model, x)
    remove_inputs(model, (x,), (InputRemoval("select", (0, 4)),))
    torch.testing.assert_close(outputs(model, x), expected)
    assert (model.left.in_features, model.right.in_features) == (4, 4)
    assert (model.left.weight.requires_grad, model.right.weight.requires_grad) == (False, True)


def test_a_plan_with_inputs_is_written_read_and_edited(tmp_path: Path):
    rows = (
        LayerRow("layer1.0.conv1", 16, 0.0, 1.0, 0.5, 10),
        LayerRow("layer1.0.select", 16, 0.0, 1.0, 0.5, 20, InputRemoval.type),
    )
    whole = Plan("f", (3, 32, 32), REMOVALS[:2], rows, (10, 5), (10, 5), {})
    path = whole.save(tmp_path / "plan.json")
    assert Plan.load(path) == whole
    content = json.loads(path.read_text())
    assert [entry.get("type") for entry in content["removals"]] == ["inputs", None]
    assert [row.get("type") for row in content["rows"]] == [None, "inputs"]
    edited = whole.with_removed("layer1.0.select", []).with_removed("layer1.0.select", [7])
    assert edited.removals == (REMOVALS[1], InputRemoval("layer1.0.select", (7,)))
    for key in ("removals", "rows"):
        bad = json.loads(path.read_text())
        bad[key][0]["type"] = "kernel"
        with pytest.raises(PlanError, match="'kernel' are unknown"):
            Plan.from_dict(bad)
