"""Which gamma goes with which convolution, and synaptic strength as an importance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from dscore_plugin.errors import CriterionError
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.integrations.torch_pruning.synaptic import (
    SynapticStrengthImportance,
    find_links,
    kernel_scores,
)
from dscore_plugin.models import create_model
from dscore_plugin.plan import InputRemoval, Plan
from dscore_plugin.surgery.kernels import prune_kernels
from tests.architectures import LARGE, SMALL, chain, randomised

IMAGE = (torch.zeros(1, 3, 32, 32),)


def expected(weight: Tensor, gamma: Tensor | None) -> Tensor:
    norms = weight.detach().flatten(2).norm(dim=2)
    return norms if gamma is None else norms * gamma.detach().abs()


def gamma_of(model: nn.Module, name: str | None) -> Tensor | None:
    return None if name is None else model.get_submodule(name).weight


@pytest.mark.parametrize(
    ("name", "fed"),
    [
        ("cifar_resnet20", {"conv1": None, "layer1.1.conv1": None, "layer2.0.conv2": "layer2.0.bn1"}),
        ("cifar_vgg16_bn", {"features.0": None, "features.3": "features.1", "features.7": "features.4"}),
        ("cifar_preresnet20", {"layer1.0.conv1": "layer1.0.bn1", "layer1.0.shortcut": None}),
        (
            "cifar_resnet18",
            {"layer1.0.conv1": "bn1", "layer2.0.conv1": None, "layer2.0.conv2": "layer2.0.bn1"},
        ),
        ("cifar_densenet40", {"block1.3.conv2": "block1.3.norm1"}),
    ],
)
def test_gamma_is_that_of_the_norm_in_front(name: str, fed: dict[str, str | None]) -> None:
    model = randomised(create_model(name))
    if name == "cifar_densenet40":
        fed = {link.convolutions[0]: link.norm for link in find_links(model, IMAGE)[:4]}
    scores = kernel_scores(model, IMAGE)
    convolutions = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert scores.keys() == convolutions
    for layer, norm in fed.items():
        weight = model.get_submodule(layer).weight
        torch.testing.assert_close(scores[layer], expected(weight, gamma_of(model, norm)))


class Joined(nn.Module):
    """A concatenation of channels without a norm, of a residual sum's, of a slice's, and of scaled ones."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.next = nn.Conv2d(15, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), torch.relu(self.norm(self.right(x)))
        joined = torch.cat([left, left + left.relu(), right[:, 1:3], right[:, :, ::2].repeat(1, 1, 2, 1)], 1)
        return self.next(joined).mean((2, 3))


def test_a_concatenation_joins_the_scales_of_its_parts() -> None:
    model = randomised(Joined())
    gamma = torch.cat([torch.ones(10), model.norm.weight])
    torch.testing.assert_close(kernel_scores(model, IMAGE)["next"], expected(model.next.weight, gamma))


class Inception(nn.Module):
    """Two branches with norms, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.bare = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 6, 3), nn.Conv2d(3, 4, 3)
        self.left_norm, self.right_norm = nn.BatchNorm2d(8), nn.BatchNorm2d(6)
        self.next, self.head = nn.Conv2d(18, 5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.relu(self.left_norm(self.left(x))), torch.relu(self.right_norm(self.right(x)))
        x = self.next(torch.cat([left, torch.max_pool2d(torch.relu(self.bare(x)), 3, 1, 1), right], 1))
        return self.head(x.mean((2, 3)))


def test_a_concatenation_that_has_been_pruned_joins_the_scales_that_are_left() -> None:
    model, importance = randomised(Inception()), SynapticStrengthImportance()
    image = torch.zeros(1, 3, 8, 8)
    pruner = tp.pruner.BasePruner(
        model,
        image,
        importance,
        pruning_ratio=0.5,
        iterative_steps=2,
        ignored_layers=[model.next, model.head],
    )
    pruner.step()
    bare = model.bare.out_channels
    gamma = torch.cat([model.left_norm.weight, torch.ones(bare), model.right_norm.weight])
    strength = expected(model.next.weight, gamma).sum(dim=0).double()
    starts = {"left": 0, "bare": len(model.left_norm.weight), "right": len(model.left_norm.weight) + bare}
    for group in pruner.DG.get_all_groups(ignored_layers=[model.next, model.head]):
        name = next(name for name in starts if group[0].dep.target.module is getattr(model, name))
        here = strength[starts[name] :][: len(group[0].idxs)]
        torch.testing.assert_close(importance(group), here, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("index", [[5, 4, 3, 2, 1, 0], [4, 1, 1], [True, False, True, True, True, False]])
def test_an_index_moves_the_scales_with_the_channels(index: list[Any]) -> None:
    places = torch.arange(6)[torch.tensor(index)]

    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.next = (
                nn.Conv2d(3, 6, 3),
                nn.BatchNorm2d(6),
                nn.Conv2d(len(places), 4, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.next(torch.relu(self.norm(self.conv(x)))[:, torch.tensor(index)]).mean((2, 3))

    model = randomised(Indexed())
    torch.testing.assert_close(
        kernel_scores(model, IMAGE)["next"], expected(model.next.weight, model.norm.weight[places])
    )


def test_a_channel_selection_selects_the_scales_too() -> None:
    model = randomised(create_model("cifar_preresnet20"))
    removal = InputRemoval("layer1.1.select", tuple(range(0, 64, 2)))
    Plan("", (3, 32, 32), (removal,)).apply(model)
    block = model.layer1[1]
    torch.testing.assert_close(
        kernel_scores(model, IMAGE)["layer1.1.conv1"], expected(block.conv1.weight, block.bn1.weight[1::2])
    )


def test_removed_kernels_score_zero() -> None:
    model = create_model("cifar_resnet20")
    prune_kernels(model, {"layer1.0.conv2": torch.eye(16) > 0})
    scores = kernel_scores(model, IMAGE)["layer1.0.conv2"]
    assert bool((scores.gt(0) == (torch.eye(16) > 0)).all())


@pytest.mark.parametrize("name", ["residual", "flattened", "concatenated_twice", "squeezed"])
def test_channels_count_for_the_connections_that_read_them(name: str) -> None:
    architecture = SMALL[name]
    model = architecture.randomised()
    graph = PruningGraph(model, architecture.inputs)
    for group in graph.prunable:
        scored = graph.score(group, SynapticStrengthImportance())
        assert scored is not None
        assert len(torch.unique(scored.scores)) == group.units  # nothing for an unstable topk to choose from
    if name == "residual":
        scored = graph.score(
            next(g for g in graph.prunable if g.name == "conv1"), SynapticStrengthImportance()
        )
        kernels = expected(model.conv2.weight, model.bn1.weight).sum(dim=0).double()
        torch.testing.assert_close(scored.scores, kernels, atol=1e-6, rtol=1e-5)


def test_torch_prunings_pruner_takes_it() -> None:
    model = LARGE["cifar_vgg16_bn"].randomised()
    importance = SynapticStrengthImportance()
    pruner = tp.pruner.BasePruner(
        model, IMAGE, importance, pruning_ratio=0.5, global_pruning=True, ignored_layers=[model.classifier]
    )
    pruner.step()
    assert model(*IMAGE).shape == (1, 10)
    assert sum(p.numel() for p in model.parameters()) < 14_724_042 * 0.5


def test_nan_is_reported_with_the_layer() -> None:
    model = create_model("cifar_resnet20")
    model.layer1[0].conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(CriterionError, match=r"'layer1\.0\.conv1'.*NaN"):
        kernel_scores(model, IMAGE)


def test_links_name_what_stands_between() -> None:
    build: Any = chain(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.Conv2d(8, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        width=6,
    )
    (link,) = find_links(build(), (torch.zeros(1, 3, 8, 8),))
    assert (link.norm, link.convolutions, link.between) == ("body.1", ("body.3",), ("Gelu",))
