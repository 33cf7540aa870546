from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dscore_plugin.criteria.d_score import d_score
from dscore_plugin.errors import CriterionError, ModelError
from dscore_plugin.groups import Role
from dscore_plugin.integrations.torch_pruning.counting import count
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph, producers
from dscore_plugin.integrations.torch_pruning.removal import remove_channels
from dscore_plugin.plan import ChannelRemoval
from tests.architectures import IMAGE, LARGE, SMALL, UNMAPPABLE, Residual, Tied, chain

X = (torch.zeros(1, *IMAGE),)


def protected(graph: PruningGraph) -> dict[str, str]:
    return {group.name: group.protected for group in graph.groups if group.protected}


@pytest.mark.parametrize("name", [*SMALL, *UNMAPPABLE, "cifar_resnet56", "resnet18", "mobilenetv2_100"])
def test_what_cannot_be_followed_is_protected_and_nothing_else(name: str) -> None:
    architecture = {**LARGE, **SMALL, **UNMAPPABLE}[name]
    model = architecture.randomised()
    graph = PruningGraph(model, architecture.inputs)
    outputs = {name for name, reason in protected(graph).items() if "an output of the network" in reason}
    assert set(protected(graph)) - outputs == set(architecture.protected) - {"conv2"}
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    assert outputs - {"conv2"} == {last}
    assert len(graph.prunable) >= 1 or name in ("running_statistics", "unequal_positions")


def test_the_layer_in_front_of_the_classifier_is_prunable() -> None:
    for name, last in (("resnet18", "layer4.0.downsample.0"), ("cifar_vgg16_bn", "features.40")):
        graph = PruningGraph(LARGE[name].randomised(), LARGE[name].inputs)
        assert last in {group.name for group in graph.prunable}


def test_members_and_units_of_a_residual_block() -> None:
    graph = PruningGraph(Residual(), X)
    groups = {group.name: group for group in graph.groups}
    trunk = groups["conv2"]
    assert (trunk.units, trunk.division, trunk.is_inner) == (8, 1, False)
    assert {m.module for m in trunk.roles(Role.PRODUCER)} == {"stem", "conv2"}
    assert {m.module for m in trunk.roles(Role.CONSUMER)} == {"conv1", "fc"}
    assert {m.module for m in trunk.roles(Role.NORM)} == {"bn0", "bn2"}
    assert groups["conv1"].is_inner
    for member in trunk.members:
        assert member.index.tolist() == member.unit.tolist() == list(range(8))
        assert member.width == 8


def test_units_of_grouped_and_flattened_layers() -> None:
    mixed = {g.name: g for g in PruningGraph(SMALL["mixed"].randomised(), SMALL["mixed"].inputs).groups}
    assert (mixed["stem"].channels, mixed["stem"].division, mixed["stem"].units) == (16, 4, 4)
    assert mixed["stem"].root_channels([1]) == (1, 5, 9, 13)
    (consumer,) = mixed["stem"].roles(Role.CONSUMER)
    assert consumer.positions(torch.tensor([1])).tolist() == [1, 5, 9, 13]
    architecture = SMALL["flattened"]
    flat = {g.name: g for g in PruningGraph(architecture.randomised(), architecture.inputs).groups}
    (hidden,) = flat["conv2"].roles(Role.CONSUMER)
    assert hidden.positions(torch.tensor([0, 2])).tolist() == [*range(16), *range(32, 48)]


def test_lcm_of_several_groupings() -> None:
    architecture = SMALL["groups_of_four_three_and_two"]
    divisions = {
        g.name: g.division for g in PruningGraph(architecture.randomised(), architecture.inputs).groups
    }
    assert divisions == {"head": 1, "body.0": 4, "body.2": 12, "body.4": 6, "body.6": 2}


def test_ignored_layers_keep_their_channels() -> None:
    model = Residual()
    names = {group.name for group in PruningGraph(model, X, [model.conv1]).prunable}
    assert names == {"conv2"}
    assert protected(PruningGraph(model, X, [model.stem]))["conv2"] == "'stem' is ignored"
    assert protected(PruningGraph(model, X, [model.bn1]))["conv1"] == "'bn1' is ignored"
    assert not PruningGraph(model, X, [model]).prunable
    nested = chain(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Conv2d(8, 6, 3), width=6)()
    graph = PruningGraph(nested, X, [nested.body[0]])
    assert [group.name for group in graph.prunable] == ["body.1"]


@pytest.fixture
def watched() -> Iterator[nn.Module]:
    """A network in which modes, frozen parameters and hooks differ from module to module."""
    model = Residual().train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    model.bn2.weight.requires_grad_(False)
    calls: list[int] = []
    model.stem.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    yield model
    assert [name for name, m in model.named_modules() if not m.training] == ["bn1"]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight", "bn2.weight"]
    hooks = [(name, len(m._forward_hooks)) for name, m in model.named_modules() if m._forward_hooks]
    assert hooks == [("stem", 1)]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not any("__flops__" in m.__dict__ for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_tracing_leaves_the_network_as_it_was(watched: nn.Module) -> None:
    graph = PruningGraph(watched, X)
    assert len(graph.prunable) == 2  # frozen layers are found, too
    assert graph.costs.dense.macs > 0


@pytest.mark.parametrize("batch", [2, 5])
def test_costs_are_those_of_one_image(batch: int, watched: nn.Module) -> None:
    # but for the bias of a linear layer, which the counter counts once a batch
    model = copy.deepcopy(watched)
    model.fc = nn.Linear(8, 4, bias=False)
    x = torch.zeros(batch, *IMAGE)
    one, several = PruningGraph(model, (x[:1],)).costs, PruningGraph(model, (x,)).costs
    assert one.dense == several.dense
    assert one.cost({"conv1": 3, "conv2": 2}) == several.cost({"conv1": 3, "conv2": 2})


def test_tracing_without_gradients_is_possible(watched: nn.Module) -> None:
    with torch.no_grad():
        assert len(PruningGraph(watched, X).prunable) == 2


def test_a_forward_that_raises_leaves_no_hooks(watched: nn.Module) -> None:
    with pytest.raises(
        ModelError, match=r"Residual cannot be traced with inputs of shape \[\(1, 5, 8, 8\)\]"
    ):
        PruningGraph(watched, (torch.zeros(1, 5, 8, 8),))


def test_parametrised_weights_are_refused() -> None:
    model = Residual()
    parametrizations.weight_norm(model.conv1)
    with pytest.raises(ModelError, match="'conv1' has a parametrised weight.*remove_parametrizations"):
        PruningGraph(model, X)


def test_layers_that_share_a_parameter_say_so() -> None:
    reasons = protected(PruningGraph(Tied(), X))
    assert reasons["one"] == reasons["stem"] == "'one.weight' and 'two.weight' are one parameter"
    model = chain(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), width=8)()
    assert "body.0" not in protected(PruningGraph(model, X))
    model.body[3].bias = model.body[1].bias
    assert "'body.1.bias' and 'body.3.bias'" in protected(PruningGraph(model, X))["body.0"]


def test_what_is_shared_and_loses_nothing_keeps_no_channel_back() -> None:
    class Language(nn.Module):
        """The embedding is the classifier; only the hidden layer between them is free."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.expand, self.reduce = nn.Embedding(10, 8), nn.Linear(8, 16), nn.Linear(16, 8)
            self.act, self.again, self.head = nn.PReLU(), nn.PReLU(), nn.Linear(8, 10)
            self.head.weight, self.again.weight = self.embed.weight, self.act.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.head(self.again(x + self.reduce(self.act(self.expand(x)))))

    model, words = Language(), (torch.zeros(2, 5, dtype=torch.int64),)
    graph = PruningGraph(model, words)
    assert [group.name for group in graph.prunable] == ["expand"]
    left = graph.costs.cost({"expand": 4})
    remove_channels(model, words, [ChannelRemoval("expand", (0, 1, 2, 3))])
    assert count(model, words) == (round(left.macs), round(left.params))
    assert model.head.weight is model.embed.weight


def test_a_bare_parameter_with_two_names_is_shared() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
            self.scale = self.same = nn.Parameter(torch.ones(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv2(self.conv1(x) * self.scale) * self.same)

    reasons = protected(PruningGraph(Scaled(), X))
    assert reasons["conv2"] == "'scale' and 'same' are one parameter"


def test_scores_are_averaged_over_the_channels_of_a_unit() -> None:
    architecture = SMALL["mixed"]
    graph = PruningGraph(architecture.randomised(), architecture.inputs)
    group = next(group for group in graph.groups if group.name == "stem")
    scored = graph.score(group, lambda _: torch.arange(16.0))
    assert scored is not None
    assert scored.scores.tolist() == [6.0, 7.0, 8.0, 9.0]  # (0 + 4 + 8 + 12) / 4, ...
    assert scored.scores.dtype == torch.float64


@pytest.mark.parametrize("nothing", [None, torch.zeros(0)])
def test_no_scores(nothing: Tensor | None) -> None:
    graph = PruningGraph(Residual(), X)
    assert graph.score(graph.prunable[0], lambda _: nothing) is None


def test_a_wrong_number_of_scores_is_refused() -> None:
    graph = PruningGraph(Residual(), X)
    with pytest.raises(CriterionError, match="one score for each of the 8 channels of 'conv2'"):
        graph.score(graph.prunable[0], lambda _: torch.zeros(4))


def depgraph(model: nn.Module, x: Tensor = X[0]) -> tp.DependencyGraph:
    return tp.DependencyGraph().build_dependency(model, (x,), verbose=False)


def test_producers_of_a_whole_group() -> None:
    model = Residual()
    pruner = tp.prune_conv_out_channels
    group = depgraph(model).get_pruning_group(model.stem, pruner, list(range(8)))
    found = list(producers(group))
    assert {producer.module for producer in found} == {model.stem, model.conv2}
    assert all(producer.index is None and producer.root is None for producer in found)


def test_producers_of_part_of_a_group() -> None:
    model = Residual()
    group = depgraph(model).get_pruning_group(model.conv2, tp.prune_conv_out_channels, [5, 1, 6])
    for producer in producers(group):
        assert producer.index is not None
        assert producer.root is not None
        here = dict(zip(producer.root.tolist(), producer.index.tolist(), strict=True))
        assert here == {0: 5, 1: 1, 2: 6}
        assert len(producer.filters) == 8


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_filters_of_transposed_convolutions(kind: type[nn.ConvTranspose2d], groups: int) -> None:
    dimensions = int(kind.__name__[-2])
    torch.manual_seed(0)
    layer = kind(8, 8, 3, groups=groups, bias=False)
    model = nn.Sequential(layer, nn.ReLU(), {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions](8, 4, 1))
    graph = depgraph(model, torch.zeros(1, 8, *[5] * dimensions))
    group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(8)))
    filters = next(p.filters for p in producers(group) if p.module is layer)
    # filter j is what the output channel j is made of: the response to a unit impulse in each input channel
    for channel in range(8):
        impulse = torch.zeros(8, 8, *[1] * dimensions)
        impulse[range(8), range(8)] = 1
        response = layer(impulse)[:, channel]
        own = response[response.flatten(1).abs().sum(1) > 0]
        assert torch.allclose(filters[channel], own, atol=1e-6)
    assert d_score(filters).shape == (8,)


def test_a_single_transposed_filter() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(8, 1, 3), nn.ReLU(), nn.Conv2d(1, 4, 1))
    graph = depgraph(model, torch.zeros(1, 8, 5, 5))
    group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [0])
    assert next(producers(group)).filters.shape == (1, 8, 3, 3)


@pytest.mark.parametrize("name", ["prelu", "norms_without_weights", "convnext_block", "shared", "windows"])
def test_every_single_channel_costs_what_the_table_says(name: str) -> None:
    architecture = SMALL[name]
    model = architecture.randomised()
    graph = PruningGraph(model, architecture.inputs)
    for group in graph.prunable:
        pruned = copy.deepcopy(model)
        other = PruningGraph(pruned, architecture.inputs)
        root = pruned.get_submodule(group.name)
        prune_out = other.depgraph.get_pruner_of_module(root).prune_out_channels
        other.depgraph.get_pruning_group(root, prune_out, list(group.root_channels([1]))).prune()
        left = graph.costs.cost({group.name: 1})
        assert count(pruned, architecture.inputs) == (round(left.macs), round(left.params))


def test_counting_leaves_the_network_as_it_was(watched: nn.Module) -> None:
    macs, params = count(watched, X)
    assert params == sum(p.numel() for p in watched.parameters())
    assert macs == tp.utils.count_ops_and_params(copy.deepcopy(watched), X)[0]


def test_subclasses_of_layers_are_counted() -> None:
    class Own(nn.Conv2d):
        pass

    plain, own = nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Sequential(Own(3, 8, 3))
    assert count(own, X) == count(plain, X)
    assert count(plain, X)[0] == 36 * (27 * 8 + 8)
