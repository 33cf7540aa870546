"""The importance classes in every mode of Torch-Pruning's pruners."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn

from dscore_plugin import DScoreImportance, DStepGMImportance, DStepImportance
from dscore_plugin.criteria.d_score import d_score, d_step, d_step_gm, rank, signed_mass
from dscore_plugin.errors import CriterionError
from dscore_plugin.integrations.torch_pruning import importance as classes
from dscore_plugin.integrations.torch_pruning import register
from tests.architectures import IMAGE, LARGE, SMALL, Residual, randomised

IMPORTANCES = (DScoreImportance, DStepImportance, DStepGMImportance)
FUNCTIONS = {DScoreImportance: d_score, DStepImportance: d_step, DStepGMImportance: d_step_gm}
X = torch.zeros(1, *IMAGE)
Importance = Callable[[Any], Tensor | None]


def pruner(
    model: nn.Module, importance: Importance, kind: type = tp.BasePruner, x: Tensor = X, **options: Any
) -> Any:
    """Build a pruner; its dictionaries are fresh, as its own defaults are shared by all of them."""
    fresh = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}, "channel_groups": {}}
    head = [getattr(model, name) for name in ("fc", "head") if hasattr(model, name)]
    arguments = {"ignored_layers": head, **fresh, **options}
    return kind(model, x, importance=importance, **arguments)


def resnet(seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return timm.create_model("resnet18", num_classes=10).eval(), torch.zeros(1, 3, 32, 32)


def widths(model: nn.Module) -> dict[str, int]:
    return {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def groups(model: nn.Module, x: Tensor = X, **options: Any) -> list[Any]:
    graph = tp.DependencyGraph().build_dependency(model, (x,), verbose=False)
    return list(graph.get_all_groups(**options))


def group_of(model: nn.Module, layer: nn.Conv2d, channels: list[int] | None = None, x: Tensor = X) -> Any:
    graph = tp.DependencyGraph().build_dependency(model, (x,), verbose=False)
    chosen = list(range(layer.out_channels)) if channels is None else channels
    return graph.get_pruning_group(layer, tp.prune_conv_out_channels, chosen)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_single_layer_is_scored_by_the_pure_function(importance: type[DScoreImportance]) -> None:
    model = Residual()
    scores = importance()(group_of(model, model.conv1))
    assert scores is not None
    assert scores.dtype == torch.float64
    assert torch.allclose(scores.float(), FUNCTIONS[importance](model.conv1.weight), atol=1e-6)
    order = torch.argsort(FUNCTIONS[importance](model.conv1.weight), stable=True)
    assert torch.equal(torch.argsort(scores), order)  # ties within a layer by index


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("reduction", ["mean", "max", "first"])
def test_a_residual_sum_reduces_over_its_producers(
    importance: type[DScoreImportance], reduction: str
) -> None:
    torch.manual_seed(3)
    model, function = Residual(), FUNCTIONS[importance]
    stem, conv2 = function(model.stem.weight), function(model.conv2.weight)
    by_hand = {
        "mean": (stem.double() + conv2.double()) / 2,
        "max": torch.maximum(stem, conv2),
        "first": conv2,  # the root of the group below
    }[reduction]
    scores = importance(group_reduction=reduction)(group_of(model, model.conv2))
    assert scores is not None
    assert torch.allclose(scores, by_hand.double(), atol=1e-6)
    if reduction == "first":
        scores = importance(group_reduction=reduction)(group_of(model, model.stem))
        assert scores is not None
        assert torch.allclose(scores, stem.double(), atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_equal_means_over_a_residual_sum_go_by_index(seed: int) -> None:
    torch.manual_seed(seed)
    model = Residual()
    sums = sum(rank(mass) for layer in (model.stem, model.conv2) for mass in signed_mass(layer.weight))
    scores = DScoreImportance()(group_of(model, model.conv2))
    assert scores is not None
    assert torch.equal(torch.argsort(scores), torch.argsort(sums, stable=True))


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("channels", [[5, 1, 6], [0, 1, 2], [7]])
def test_part_of_a_group_has_the_scores_of_the_whole(
    importance: type[DScoreImportance], channels: list[int]
) -> None:
    model = Residual()
    whole = importance()(group_of(model, model.conv2))
    part = importance()(group_of(model, model.conv2, channels))
    assert whole is not None
    assert part is not None
    assert torch.allclose(part, whole[channels], atol=1e-7)


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("name", ["resnet50", "mobilenetv2_100"])
def test_no_two_channels_of_a_network_score_the_same(importance: type[DScoreImportance], name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    scores = [importance()(group) for group in groups(model, torch.zeros(1, 3, 32, 32))]
    together = torch.cat([score for score in scores if score is not None])
    assert len(together.unique()) == len(together)


def test_copies_of_a_layer_are_told_apart_by_mass() -> None:
    model = SMALL["bn_free"].randomised()
    first, second = model.body[0], model.body[2]
    second.weight.data.normal_()
    first.weight.data = second.weight.data[:, :3].repeat(2, 1, 1, 1)[:8] * 0.5
    scores = DStepImportance()(group_of(model, first))
    heavier = nn.Conv2d(3, 8, 3)
    heavier.weight.data = first.weight.data * 2
    model.body[0] = heavier
    other = DStepImportance()(group_of(model, heavier))
    assert scores is not None
    assert other is not None
    assert (other > scores).all()
    assert (other - scores).max() < 1e-7


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_local_pruning_takes_the_least_important(importance: type[DScoreImportance]) -> None:
    model, x = resnet()
    dense = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    pruner(model, importance(), x=x, pruning_ratio=0.5).step()
    assert all(width == len(dense[name]) // 2 for name, width in widths(model).items())
    model(torch.randn(2, *x.shape[1:]))
    name = "layer1.0.conv1"  # a layer of its own; its inputs are pruned, too
    kept = torch.argsort(FUNCTIONS[importance](dense[name]), stable=True)[32:].sort().values
    inputs = model.get_submodule(name).weight.detach()
    columns = [c for c in range(64) if (dense[name][kept][:, c] == inputs[:, 0]).all()]
    assert len(columns) == 1
    whole = {tuple(row.flatten().tolist()) for row in dense[name][kept][:, columns[0]]}
    assert {tuple(row.flatten().tolist()) for row in inputs[:, 0]} == whole


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
def test_global_pruning_removes_exactly_as_many_channels_as_it_should(
    importance: type[DScoreImportance], ratio: float
) -> None:
    model, x = resnet()
    head = [model.fc]
    before = sum(len(group[0].idxs) for group in groups(model, x, ignored_layers=head))
    pruner(model, importance(), x=x, global_pruning=True, pruning_ratio=ratio).step()
    after = sum(len(group[0].idxs) for group in groups(model, x, ignored_layers=head))
    assert after == int(before * (1 - ratio))
    model(torch.randn(2, *x.shape[1:]))


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_isomorphic_pruning(importance: type[DScoreImportance]) -> None:
    model, x = resnet()
    dense = widths(model)
    pruner(model, importance(), x=x, global_pruning=True, isomorphic=True, pruning_ratio=0.3).step()
    model(torch.randn(2, *x.shape[1:]))
    assert sum(widths(model).values()) == pytest.approx(0.7 * sum(dense.values()), rel=0.03)


def units(model: nn.Module, x: Tensor) -> int:
    """Channels that a pruner can choose from."""
    return sum(len(group[0].idxs) for group in groups(model, x, ignored_layers=[model.fc]))


@pytest.mark.parametrize("global_pruning", [False, True])
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_iterative_pruning(importance: type[DScoreImportance], global_pruning: bool) -> None:
    model, x = resnet()
    before = units(model, x)
    iterative = pruner(
        model, importance(), x=x, pruning_ratio=0.5, iterative_steps=4, global_pruning=global_pruning
    )
    for left in (0.875, 0.75, 0.625, 0.5):
        iterative.step()
        assert units(model, x) == int(before * left)
        model(torch.randn(2, *x.shape[1:]))


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_round_to(importance: type[DScoreImportance]) -> None:
    model, x = resnet()
    pruner(model, importance(), x=x, pruning_ratio=0.3, round_to=16).step()
    model(torch.randn(2, *x.shape[1:]))
    assert {width % 16 for width in widths(model).values()} == {0}
    assert model.conv1.out_channels == 32


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_max_pruning_ratio(importance: type[DScoreImportance]) -> None:
    least = {}
    for limit in (0.25, 1.0):
        model, x = resnet()
        dense = widths(model)
        options = {"global_pruning": True, "iterative_steps": 6, "max_pruning_ratio": limit}
        iterative = pruner(model, importance(), x=x, pruning_ratio=0.6, **options)
        for _ in range(6):
            iterative.step()
        model(torch.randn(2, *x.shape[1:]))
        least[limit] = min(width / dense[name] for name, width in widths(model).items())
    # Torch-Pruning leaves a layer alone once it is beyond the limit, one step late
    assert least[1.0] < 0.5 < least[0.25]


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_ratio_for_each_layer(importance: type[DScoreImportance]) -> None:
    model, x = resnet()
    ratios = {model.layer2[0].conv1: 0.25, model.layer3[0].conv1: 0.75}
    pruner(model, importance(), x=x, pruning_ratio=0.5, pruning_ratio_dict=ratios).step()
    model(torch.randn(2, *x.shape[1:]))
    assert model.layer1[0].conv1.out_channels == 32
    assert model.layer2[0].conv1.out_channels == 96
    assert model.layer3[0].conv1.out_channels == 64


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_interactive_pruning(importance: type[DScoreImportance]) -> None:
    model, x = resnet()
    steps = 0
    for group in pruner(model, importance(), x=x, pruning_ratio=0.5).step(interactive=True):
        least = torch.argsort(importance()(group))  # of the part that is offered
        assert len(least) == len(group[0].idxs)
        group.prune()
        steps += 1
    assert steps == 12
    model(torch.randn(2, *x.shape[1:]))


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize(
    "name",
    ["mixed", "resnext50_32x4d", "conv_3d", "flattened", "layer_norm", "squeezed", "shared"],
)
def test_layers_of_every_kind(importance: type[DScoreImportance], name: str) -> None:
    architecture = (SMALL | LARGE)[name]
    model = architecture.randomised()
    before = sum(p.numel() for p in model.parameters())
    pruner(model, importance(), x=architecture.inputs[0], pruning_ratio=0.5).step()
    model(torch.randn(2, *architecture.shape))
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_depthwise_convolutions(importance: type[DScoreImportance]) -> None:
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_100", num_classes=10).eval()
    x = torch.zeros(1, 3, 32, 32)
    pruner(model, importance(), x=x, pruning_ratio=0.5, ignored_layers=[model.classifier]).step()
    model(torch.randn(2, *x.shape[1:]))
    assert model.conv_stem.out_channels == 16


def vit() -> tuple[nn.Module, dict[nn.Module, int], Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, depth=2).eval()
    heads = {block.attn.qkv: block.attn.num_heads for block in model.blocks}
    return model, heads, torch.zeros(1, 3, 32, 32)


def refresh(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    """Tell timm's attention how many heads are left, and how wide they are, as Torch-Pruning's example does."""
    for block in model.blocks:
        attention = block.attn
        attention.num_heads = heads[attention.qkv]
        attention.attn_dim = attention.qkv.out_features // 3
        attention.head_dim = attention.attn_dim // attention.num_heads
    model.embed_dim = model.num_features = model.head.in_features


@pytest.mark.parametrize("global_pruning", [False, True])
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_attention_heads(importance: type[DScoreImportance], global_pruning: bool) -> None:
    model, heads, x = vit()
    options = {
        "num_heads": heads,
        "prune_num_heads": True,
        "prune_head_dims": False,
        "head_pruning_ratio": 0.34,
    }
    pruner(model, importance(), x=x, pruning_ratio=0.25, global_pruning=global_pruning, **options).step()
    refresh(model, heads)
    assert model(torch.randn(2, *x.shape[1:])).shape == (2, 10)
    if not global_pruning:
        assert set(heads.values()) == {1}  # of three, two leave: Torch-Pruning rounds up
        assert model.blocks[0].attn.qkv.out_features == 3 * 64
        assert model.blocks[0].mlp.fc1.out_features == 576
        assert model.embed_dim == 144


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_the_width_of_attention_heads(importance: type[DScoreImportance]) -> None:
    model, heads, x = vit()
    pruner(model, importance(), x=x, pruning_ratio=0.5, num_heads=heads).step()
    refresh(model, heads)
    assert model(torch.randn(2, *x.shape[1:])).shape == (2, 10)
    assert {block.attn.head_dim for block in model.blocks} == {32}
    assert set(heads.values()) == {3}


@pytest.mark.parametrize("kind", [tp.BNScalePruner, tp.GroupNormPruner, tp.GrowingRegPruner])
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_other_pruners_take_them(kind: type, importance: type[DScoreImportance]) -> None:
    model = randomised(Residual()).train()
    sparse = pruner(model, importance(), kind, pruning_ratio=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    sparse.update_regularizer()
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(4, *IMAGE)), torch.arange(4)).backward()
        sparse.regularize(model)
        optimizer.step()
        if hasattr(sparse, "update_reg"):
            sparse.update_reg()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    sparse.step()
    assert (model.stem.out_channels, model.conv1.out_channels) == (4, 6)
    model(torch.randn(2, *IMAGE))


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision(importance: type[DScoreImportance], dtype: torch.dtype) -> None:
    model = Residual()
    group = group_of(model, model.conv2)
    model.to(dtype)
    half = importance()(group)
    model.float()
    assert half is not None
    assert half.dtype == torch.float64
    assert torch.equal(torch.argsort(half), torch.argsort(importance()(group)))


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(importance: type[DScoreImportance], bad: float) -> None:
    model = Residual()
    model.conv1.weight.data[3, 0, 0, 0] = bad
    with pytest.raises(CriterionError, match="NaN or infinity"):
        importance()(group_of(model, model.conv1))
    with pytest.raises(CriterionError, match="NaN or infinity"):
        pruner(model, importance(), pruning_ratio=0.5).step()


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_an_unknown_reduction_is_refused(importance: type[DScoreImportance]) -> None:
    with pytest.raises(CriterionError, match="'maen' is unknown.*did you mean 'mean'"):
        importance(group_reduction="maen")


def test_a_group_without_filters_has_no_score() -> None:
    model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 3))
    graph = tp.DependencyGraph().build_dependency(
        model, (torch.zeros(1, 2, dtype=torch.int64),), verbose=False
    )
    group = graph.get_pruning_group(model[0], tp.prune_embedding_out_channels, list(range(6)))
    assert DScoreImportance()(group) is None


def test_scoring_keeps_the_group_and_the_gradients_as_they_are() -> None:
    model = Residual()
    group = group_of(model, model.conv2, [6, 2, 4])
    before = [(list(item.idxs), list(item.root_idxs)) for item in group]
    scores = DScoreImportance()(group)
    assert scores is not None
    assert not scores.requires_grad
    assert [(list(item.idxs), list(item.root_idxs)) for item in group] == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_fixed_filters_beside_trained_ones_have_no_say() -> None:
    model = Residual()
    group = group_of(model, model.conv2, list(range(model.conv2.out_channels)))
    both = DScoreImportance()(group)
    others = [p.module for p in classes.producers(group) if p.module is not model.conv2]
    assert others, "a residual sum has several producers"
    for layer in others:
        layer.weight.requires_grad_(False)
    alone = DScoreImportance()(group)
    assert not torch.allclose(alone, both, atol=1e-6)
    torch.testing.assert_close(
        alone, d_score(model.conv2.weight.detach()).double(), atol=1e-6, rtol=0
    )  # up to what sets ties apart
    model.requires_grad_(False)
    torch.testing.assert_close(DScoreImportance()(group), both)


def test_register_puts_the_classes_beside_torch_prunings_own() -> None:
    register()
    assert tp.importance.DScoreImportance is DScoreImportance
    assert tp.importance.DStepImportance is DStepImportance
    assert tp.importance.DStepGMImportance is DStepGMImportance
    assert isinstance(tp.importance.DScoreImportance(), tp.importance.Importance)
    assert {name for name in classes.__all__ if hasattr(tp.importance, name)} == set(classes.__all__)


def test_registering_is_the_users_choice() -> None:
    code = "import torch_pruning as tp, dscore_plugin; dscore_plugin.DScoreImportance; "
    code += "assert not hasattr(tp.importance, 'DScoreImportance')"
    subprocess.run([sys.executable, "-c", code], check=True)
