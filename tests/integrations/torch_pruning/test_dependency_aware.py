"""The importance inside DepGraph's groups, what the paper scores, and Torch-Pruning's pruners under the controller."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional

from dscore_plugin import DependencyAwareImportance, plan_pruning, prune
from dscore_plugin.criteria.dependency_aware import dependency_aware, final_threshold, sparsity, survivors
from dscore_plugin.errors import CriterionError
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.integrations.torch_pruning.links import linked_score, links, scored_layers
from dscore_plugin.integrations.torch_pruning.sparsity import pruner_penalty
from dscore_plugin.masking import masked
from dscore_plugin.models import create_model
from dscore_plugin.training.sparsity import DependencyAwareRegularizer, measure_sparsity

IMAGE = torch.zeros(1, 3, 8, 8)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fresh networks hide errors behind ones and zeros: give norms scales of both signs, shifts and statistics."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    tensor.data = torch.randn(tensor.shape, generator=generator)
            module.running_var.data = torch.rand(module.running_var.shape, generator=generator) + 0.5
    return model.eval()


def groups_of(model: nn.Module, image: Tensor = IMAGE) -> dict[str, Any]:
    return PruningGraph(model, (image,)).depgroups


def conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **options)


class Branches(nn.Module):
    """One norm, read by two convolutions, one of them in groups; then a flatten and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = conv(3, 8), nn.BatchNorm2d(8)
        self.left, self.right = conv(8, 4), conv(8, 6, groups=2)
        self.left_bn, self.right_bn = nn.BatchNorm2d(4), nn.BatchNorm2d(6)
        self.left_head, self.right_head = nn.Linear(4 * 64, 5), nn.Linear(6 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.first(x)))
        left, right = (
            functional.relu(self.left_bn(self.left(x))),
            functional.relu(self.right_bn(self.right(x))),
        )
        return self.left_head(left.flatten(1)) + self.right_head(right.flatten(1))


class Residual(nn.Module):
    """A stream fed by two norms, read by a convolution and the head; and a convolution without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = conv(3, 6), nn.BatchNorm2d(6)
        self.conv1 = conv(6, 7)
        self.conv2, self.bn2 = conv(7, 6), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem_bn(self.stem(x)))
        x = functional.relu(x + self.bn2(self.conv2(functional.relu(self.conv1(x)))))
        return self.head(x.mean(dim=(2, 3)))


class Depthwise(nn.Module):
    """Two norms in a row around a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = conv(3, 8), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = conv(8, 8, groups=8), nn.BatchNorm2d(8)
        self.project, self.bn3 = conv(8, 5), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.expand(x)))
        x = functional.relu(self.bn2(self.depthwise(x)))
        return self.head(self.bn3(self.project(x)).mean(dim=(2, 3)))


def mean_magnitude(weight: Tensor) -> Tensor:
    return weight.detach().abs().flatten(1).mean(dim=1)


def test_several_consumers_add_up():
    model = randomised(Branches())
    expected = dependency_aware(model.bn.weight, model.left.weight)
    expected = expected + dependency_aware(model.bn.weight, model.right.weight)
    torch.testing.assert_close(linked_score(groups_of(model)["first"]).float(), expected)


def test_a_linear_layer_behind_a_flatten_is_read_channel_by_channel():
    model = randomised(Branches())
    expected = dependency_aware(model.left_bn.weight, model.left_head.weight)
    torch.testing.assert_close(linked_score(groups_of(model)["left"]).float(), expected)


@pytest.mark.parametrize("outputs", [3, 8])
def test_training_and_importance_agree_on_a_transposed_convolution(outputs):
    """Its weight is (in, out, ...); channel 5, which nothing reads, scores 0."""
    model = randomised(
        nn.Sequential(
            conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, outputs, 2, 2), nn.Flatten(),
            nn.Linear(outputs * 256, 4),
        )
    )  # fmt: skip
    with torch.no_grad():
        model[3].weight[5] = 0
    graph = PruningGraph(model, (IMAGE,))
    (layer,) = [found for found in scored_layers(graph) if found.name == "0"]
    assert layer.scores(model)[5] == 0
    torch.testing.assert_close(layer.scores(model), linked_score(graph.depgroups["0"]).float())


def test_a_residual_sum_adds_the_scales_that_reach_each_consumer():
    model = randomised(Residual())
    group = next(g for name, g in groups_of(model).items() if name in ("stem", "conv2"))
    early = dependency_aware(model.stem_bn.weight, model.conv1.weight)
    late = dependency_aware(model.stem_bn.weight.abs() + model.bn2.weight.abs(), model.head.weight)
    torch.testing.assert_close(linked_score(group).float(), early + late)


def test_without_a_norm_the_filters_own_magnitude_stands_for_the_scale():
    model = randomised(Residual())
    expected = dependency_aware(mean_magnitude(model.conv1.weight), model.conv2.weight)
    torch.testing.assert_close(linked_score(groups_of(model)["conv1"]).float(), expected)


def test_of_two_norms_in_a_row_the_nearer_one_counts():
    model = randomised(Depthwise())
    group = next(g for name, g in groups_of(model).items() if name in ("expand", "depthwise"))
    (link,) = links(group)
    assert [source.dep.target.module for source in link.sources] == [model.bn2]
    expected = dependency_aware(model.bn2.weight, model.project.weight)
    torch.testing.assert_close(linked_score(group).float(), expected)


def test_a_norm_without_scales_counts_as_one():
    model = nn.Sequential(conv(3, 6), nn.BatchNorm2d(6, affine=False), nn.ReLU(), conv(6, 4), nn.Flatten())
    expected = dependency_aware(torch.ones(6), model[3].weight)
    torch.testing.assert_close(linked_score(groups_of(model)["0"]).float(), expected)


def test_transposed_convolutions_in_groups_are_read_by_their_inputs():
    up = nn.ConvTranspose2d(6, 8, 3, groups=2, bias=False)
    model = nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), up, nn.Flatten())
    randomised(model)
    expected = model[1].weight.detach().abs() * mean_magnitude(up.weight)
    torch.testing.assert_close(linked_score(groups_of(model)["0"]).float(), expected)


def test_the_importance_is_relative_to_the_maximum_and_distinct():
    model = randomised(Branches())
    model.bn.weight.data[2:6] = 0
    group = groups_of(model)["first"]
    scores, raw = DependencyAwareImportance()(group), linked_score(group)
    assert scores.dtype == torch.float64
    assert len(set(scores.tolist())) == 8
    torch.testing.assert_close(scores, raw / raw.max(), atol=1e-7, rtol=0)
    assert torch.argsort(scores)[:4].tolist() == [2, 3, 4, 5]
    part = tp.DependencyGraph().build_dependency(model, IMAGE)
    part = part.get_pruning_group(model.first, tp.prune_conv_out_channels, [1, 6])
    torch.testing.assert_close(linked_score(part), raw[[1, 6]])


def test_what_nobody_reads_has_no_score_and_nan_is_refused():
    model = randomised(Branches())
    groups = groups_of(model)
    assert DependencyAwareImportance()(groups["left_head"]) is None
    model.bn.weight.data[0] = float("nan")
    with pytest.raises(CriterionError, match="NaN or infinity"):
        DependencyAwareImportance()(groups["first"])


def test_pruners_of_torch_pruning_take_it():
    model = randomised(create_model("digits_cnn", num_classes=10, in_chans=1))
    image = torch.zeros(1, 1, 8, 8)
    pruner = tp.pruner.BasePruner(
        model, image, DependencyAwareImportance(), global_pruning=True, pruning_ratio=0.5,
        ignored_layers=[model.classifier],
    )  # fmt: skip
    pruner.step()
    kept = sum(module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert kept == (16 + 32 + 64 + 64) // 2
    assert model(image).shape == (1, 10)


def test_a_global_plan_is_the_papers_threshold():
    model = randomised(create_model("digits_cnn", num_classes=10, in_chans=1))
    image = torch.zeros(1, 1, 8, 8)
    plan = plan_pruning(model, image, "dependency_aware", ratio=0.5, allocation="global", min_channels=8)
    layers = scored_layers(PruningGraph(model, (image,)))
    scores = [layer.scores(model) for layer in layers]
    threshold = final_threshold(scores, 0.5)
    assert abs(sparsity(scores, threshold) - 0.5) <= 0.5 / 176
    expected = {
        layer.name: tuple((~survivors(score, threshold, 8)).nonzero().flatten().tolist())
        for layer, score in zip(layers, scores, strict=True)
    }
    assert {r.layer: r.channels for r in plan.removals} == {
        name: gone for name, gone in expected.items() if gone
    }


@pytest.mark.parametrize("name", ["digits_cnn", "cifar_resnet20", "mobilenetv2_035"])
def test_removal_gives_what_masking_gives(name):
    torch.manual_seed(0)
    channels, size = (1, 8) if name == "digits_cnn" else (3, 32)
    model = randomised(create_model(name, num_classes=10, in_chans=channels))
    images = torch.randn(2, channels, size, size)
    graph = PruningGraph(model, (images[:1],))
    plan = plan_pruning(model, images[:1], "dependency_aware", ratio=0.4)
    groups = {group.name: group for group in graph.groups}
    silenced = [(groups[r.layer], groups[r.layer].units_of(r.channels)) for r in plan.removals]
    with masked(model, silenced), torch.no_grad():
        expected = model(images)
    plan.apply(model)
    with torch.no_grad():
        actual = model(images)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_what_the_paper_scores():
    vgg = PruningGraph(create_model("digits_cnn", num_classes=10, in_chans=1), (torch.zeros(1, 1, 8, 8),))
    assert {layer.norm: layer.consumers for layer in scored_layers(vgg)} == {
        "features.1": ("features.3",),
        "features.4": ("features.7",),
        "features.8": ("features.10",),
        "features.11": ("classifier",),
    }
    residual = PruningGraph(create_model("cifar_resnet20", shortcut="conv"), (torch.zeros(1, 3, 32, 32),))
    found = {layer.norm: layer.consumers for layer in scored_layers(residual)}
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
    assert found == {f"{block}.bn1": (f"{block}.conv2",) for block in blocks}
    branches = PruningGraph(Branches(), (IMAGE,))
    assert {layer.norm: layer.consumers for layer in scored_layers(branches)}["bn"] == ("left", "right")


def test_layers_without_a_norm_or_with_a_frozen_one_are_not_trained_towards_sparsity():
    model = Residual()
    assert scored_layers(PruningGraph(model, (IMAGE,))) == ()
    model = Depthwise()
    model.bn3.requires_grad_(False)
    (layer,) = scored_layers(PruningGraph(model, (IMAGE,)))
    assert (layer.norm, layer.consumers) == ("bn2", ("project",))


@pytest.mark.parametrize("kind", [tp.pruner.BNScalePruner, tp.pruner.GroupNormPruner])
def test_the_controller_drives_the_pruners_of_torch_pruning(kind):
    torch.manual_seed(0)
    model = create_model("digits_cnn", num_classes=10, in_chans=1)
    image = torch.randn(4, 1, 8, 8)
    pruner = kind(model, image, tp.importance.GroupMagnitudeImportance(), ignored_layers=[model.classifier])
    layers = scored_layers(PruningGraph(model, (image,)))
    regularizer = DependencyAwareRegularizer(
        model, layers, target=0.5, epochs=4, delta=0.25, penalty=pruner_penalty(pruner)
    )
    model(image).square().sum().backward()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    regularizer.after_backward(model)  # lambda is 0 in the first epoch
    assert all(torch.equal(p.grad, plain[name]) for name, p in model.named_parameters())
    regularizer.end_epoch(model, 0)
    regularizer.after_backward(model)
    assert pruner.reg == 0.25
    added = model.features[1].weight.grad - plain["features.1.weight"]
    if kind is tp.pruner.BNScalePruner:
        torch.testing.assert_close(added, 0.25 * model.features[1].weight.detach().sign(), atol=1e-5, rtol=0)
    assert (added > 0).all()


def test_prune_by_name_on_a_network_without_batch_norm():
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
    before = copy.deepcopy(model)
    prune(model, IMAGE, "dependency_aware", ratio=0.5)
    expected = dependency_aware(mean_magnitude(before[0].weight), before[2].weight)
    kept = torch.argsort(expected)[4:].sort().values
    assert torch.equal(model[0].weight, before[0].weight[kept])


def test_measured_sparsity_is_that_of_the_scores():
    model = randomised(create_model("digits_cnn", num_classes=10, in_chans=1))
    model.features[1].weight.data[:8] = 0
    layers = scored_layers(PruningGraph(model, (torch.zeros(1, 1, 8, 8),)))
    near = sum(
        int((s <= 0.02 * s.max()).sum())
        for s in (
            dependency_aware(model.features[1].weight, model.features[3].weight),
            dependency_aware(model.features[4].weight, model.features[7].weight),
            dependency_aware(model.features[8].weight, model.features[10].weight),
            dependency_aware(model.features[11].weight, model.classifier.weight),
        )
    )
    assert near >= 8
    assert measure_sparsity(model, layers) == near / 176
