from __future__ import annotations

import copy
import random

import pytest
import timm
import torch
from torch import Tensor, nn

import dscore_plugin
from dscore_plugin.artifact import load_pruned, save_pruned
from dscore_plugin.groups import ChannelGroup
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.integrations.torch_pruning.removal import remove_channels
from dscore_plugin.masking import Masks, masked
from dscore_plugin.plan import ChannelRemoval
from tests.architectures import randomised

# One small network for each kind of rule: what it needs, and the size of its images.
NETWORKS = {
    "test_vit": 160,  # heads, a class token, positions
    "test_vit3": 160,
    "test_nfnet": 96,  # weight-standardised convolutions with a gain
    "test_convnext3": 96,
    "test_mambaout": 96,  # gates cut by width
    "test_coatnet": 160,  # relative positions
    "convnextv2_atto": 64,  # global response normalisation
    "edgenext_xx_small": 96,  # splits, attention over channels
    "efficientvit_m0": 128,  # attention biases that are cached
    "mobilenetv3_small_050": 96,
    "poolformerv2_s12": 96,  # scales of a fixed shape, group norms without a bias
    "resnet26t": 96,
    "resnetblur18": 96,  # blurring with a filter for each channel
    "resnetv2_50x1_bit": 64,  # group norms with activations
    "test_vit_relpos": 160,
}


def build(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, **{"num_classes": 10, **options})
    except RuntimeError as error:
        pytest.skip(str(error))
    return randomised(model).eval()


def chosen_of(model: nn.Module, x: Tensor, share: float = 0.4) -> list[tuple[ChannelGroup, list[int]]]:
    draw = random.Random(0)
    groups = PruningGraph(model, (x[:1],)).prunable
    return [(group, draw.sample(range(group.units), max(1, int(share * group.units)))) for group in groups]


def removals(chosen: list[tuple[ChannelGroup, list[int]]]) -> list[ChannelRemoval]:
    return [ChannelRemoval(group.name, group.root_channels(units)) for group, units in chosen]


@pytest.mark.parametrize("name", NETWORKS)
def test_removal_is_the_mask_and_survives_saving(name: str, tmp_path) -> None:
    model, x = build(name), torch.randn(2, 3, NETWORKS[name], NETWORKS[name])
    chosen = chosen_of(model, x)
    assert len(chosen) >= 4
    with torch.no_grad(), masked(model, chosen):
        silenced = model(x)
    pruned = remove_channels(copy.deepcopy(model), (x[:1],), removals(chosen))
    with torch.no_grad():
        left = pruned(x)
    assert left.shape == silenced.shape
    assert (silenced - left).abs().max() <= 1e-4 * left.abs().max()
    assert sum(p.numel() for p in pruned.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())
    save_pruned(pruned, tmp_path / "model", architecture=name, model_args={"num_classes": 10})
    with torch.no_grad():
        assert torch.equal(load_pruned(tmp_path / "model")(x), left)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "mobilenetv3_small_050"])
def test_embeddings_keep_their_width(name: str) -> None:
    size = NETWORKS.get(name, 160)
    model, x = build(name, num_classes=0), torch.randn(1, 3, size, size)
    before = model(x).shape
    chosen = chosen_of(model, x)
    assert chosen
    assert remove_channels(model, (x,), removals(chosen))(x).shape == before


def test_classifiers_and_ignored_layers_keep_their_width() -> None:
    model, x = build("test_vit"), torch.randn(1, 3, 160, 160)
    fc1, stream = model.blocks[1].mlp.fc1, model.patch_embed.proj
    dscore_plugin.prune(model, x, "d_score", 0.5, ignored_layers=[fc1, stream])
    assert (model.blocks[1].mlp.fc1.out_features, model.patch_embed.proj.out_channels) == (192, 64)
    assert (model.blocks[0].mlp.fc1.out_features, model.head.out_features) == (96, 10)


@pytest.mark.parametrize("name", ["test_vit", "resnet26t", "mobilenetv3_small_050"])
def test_a_new_classifier_fits_what_is_left(name: str) -> None:
    model, x = build(name), torch.randn(2, 3, NETWORKS[name], NETWORKS[name])
    dscore_plugin.prune(model, x[:1], "d_score", 0.5)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)


def test_a_reshape_of_pooled_channels_is_no_flattening() -> None:
    # DepGraph takes view(B, 1, C) for a flatten: minutes, and wrong indices
    model = build("ecaresnet26t")
    graph = PruningGraph(model, (torch.zeros(1, 3, 64, 64),))
    groups = {group.name: group for group in graph.groups}
    assert "a Conv1d mixes" in groups["layer1.0.downsample.1"].protected
    assert {member.width for member in groups["layer1.0.conv1"].members} == {64}
    assert not groups["layer1.0.conv1"].protected


def test_masks_of_norms_leave_the_network_as_it_was() -> None:
    model, x = build("resnetv2_50x1_bit"), torch.randn(1, 3, 64, 64)
    chosen = chosen_of(model, x)
    with torch.no_grad():
        before = model(x)
        with masked(model, chosen):
            assert not torch.allclose(model(x), before, rtol=1e-2)
        assert torch.equal(model(x), before)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["resnetv2_50x1_bit", "test_vit_relpos"])  # standardised weights, RMS norms
def test_masks_in_place_know_the_same_layers(name: str) -> None:
    model, x = build(name), torch.randn(2, 3, NETWORKS[name], NETWORKS[name])
    chosen = chosen_of(model, x)
    pruned = remove_channels(copy.deepcopy(model), (x[:1],), removals(chosen))
    with torch.no_grad(), Masks(model) as masks:
        masks.silence(chosen)
        error = (model(x) - pruned(x)).abs().max() / pruned(x).abs().max()
    assert error <= 1e-4


@pytest.mark.parametrize("name", ["resnet26t", "test_efficientnet", "test_convnext"])
def test_feature_info_tells_the_widths_that_are_left(name: str, tmp_path) -> None:
    model, x = build(name), torch.randn(1, 3, 64, 64)
    dense = copy.deepcopy(model)
    dscore_plugin.prune(model, x, "d_score", 0.5)
    told = [info["num_chs"] for info in model.feature_info]
    maps: dict[str, int] = {}
    hooks = [
        model.get_submodule(info["module"]).register_forward_hook(
            lambda _m, _i, out, key=info["module"]: maps.update({key: out.shape[1]})
        )
        for info in model.feature_info
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    assert told == list(maps.values())
    assert told != [info["num_chs"] for info in dense.feature_info]
    save_pruned(model, tmp_path / "model")
    assert [info["num_chs"] for info in load_pruned(tmp_path / "model").feature_info] == told


def test_tracing_leaves_nothing_in_the_caches_of_a_network() -> None:
    model, x = build("efficientvit_m0"), torch.zeros(1, 3, 128, 128)
    with torch.no_grad():
        model(x)  # fills the caches of attention biases
    PruningGraph(model, (x,))
    copy.deepcopy(model)  # refuses tensors that hold on to a graph


def test_gated_channels_leave_in_pairs() -> None:
    model, x = build("gmlp_ti16_224", img_size=32), torch.randn(2, 3, 32, 32)
    graph = PruningGraph(model, (x[:1],))
    group = next(group for group in graph.groups if group.name == "blocks.0.mlp_channels.fc1")
    assert (group.channels, group.division, group.protected) == (768, 2, "")
    assert group.root_channels([5]) == (5, 389)
    remove_channels(model, (x[:1],), [ChannelRemoval(group.name, (5, 389))])
    assert model.blocks[0].mlp_channels.fc1.out_features == 766
    assert model.blocks[0].mlp_channels.fc2.in_features == 383
