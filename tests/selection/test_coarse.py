from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dscore_plugin.datasets import ImageData
from dscore_plugin.errors import BudgetError, CriterionError, ModelError
from dscore_plugin.groups import removal_count
from dscore_plugin.integrations.torch_pruning.graph import PruningGraph
from dscore_plugin.loading import load_object
from dscore_plugin.masking import Masks, masked
from dscore_plugin.models import create_model
from dscore_plugin.plan import KernelRemoval, Plan
from dscore_plugin.planning import plan_pruning, selection_request
from dscore_plugin.registry import get_criterion
from dscore_plugin.selection.coarse import CoarseSelector, channel_weights_removed, used_convolutions
from dscore_plugin.selection.selector import Request
from tests.selection.helpers import labelled_images, network

SHAPE = (1, 8, 8)


def images_for(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> ImageData:
    images = labelled_images(model, 60, shape, wrong=5)
    return ImageData("generated", images, images, images, 10, shape, ("",) * 10)  # type: ignore[arg-type]


def request(
    shape: tuple[int, ...] = SHAPE, granularity: str = "channel", amount: float = 0.3, **options: Any
) -> Request:
    goal = options.pop("goal", "ratio")
    return selection_request((torch.zeros(1, *shape),), granularity, goal, amount, **options)


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, ImageData]:
    model = network("digits_cnn")
    return model, images_for(model)


# Channels ---------------------------------------------------------------------------------------------------


def test_the_winner_becomes_a_plan(digits: tuple[nn.Module, ImageData]) -> None:
    model, data = digits
    plan = CoarseSelector(candidates=12, selection_images=40).select(model, data, request(seed=5))
    widths = {"features.3": 32, "features.7": 64, "features.10": 64}  # the first convolution stays whole
    assert {r.layer: len(r.indices) for r in plan.removals} == {k: int(0.3 * w) for k, w in widths.items()}
    groups = {g.name: g for g in PruningGraph(model, (torch.zeros(1, *SHAPE),)).prunable}
    x = torch.randn(4, *SHAPE)
    with masked(model, [(groups[r.layer], r.indices) for r in plan.removals]), torch.no_grad():
        expected = model(x)
    pruned = plan.apply(copy.deepcopy(model))
    assert torch.allclose(pruned(x), expected, atol=1e-4 * expected.abs().max().item())
    made = plan.made_by
    chosen = data.validation.subset(40, seed=5)
    inputs, labels = chosen.__getitems__(list(range(40)))
    assert made["winner_mcr"] == 100 * (pruned(inputs).argmax(1) != labels).double().mean().item()
    assert (made["candidates_drawn"], made["image_evaluations"], made["selection_images"]) == (12, 480, 40)
    assert made["best_so_far"][-1] == [12, made["winner_mcr"]]
    assert made["criterion"] == "coarse"
    assert made["ratio"] == 0.3

    def weights(net: nn.Module) -> int:
        layers = [m for m in net.modules() if isinstance(m, nn.Conv2d)][1:]
        return sum(m.weight.numel() for m in layers)

    assert made["weights_removed"] == round(1 - weights(pruned) / weights(model), 4)
    assert Plan.from_dict(plan.to_dict()).removals == plan.removals


def test_residual_sums_lose_the_same_channels_everywhere_but_where_the_first_layer_adds_up() -> None:
    model, shape = network("cifar_resnet20", shortcut="conv"), (3, 16, 16)
    data = images_for(model, shape)
    plan = CoarseSelector(candidates=2).select(model, data, request(shape, amount=0.25))
    whole = CoarseSelector(candidates=2, skip_first=False).select(model, data, request(shape, amount=0.25))
    assert {r.layer for r in whole.removals} - {r.layer for r in plan.removals} == {
        group.name
        for group in PruningGraph(model, (torch.zeros(1, *shape),)).prunable
        if "conv1" in [m.module for m in group.members]
    }
    pruned = plan.apply(copy.deepcopy(model))
    assert pruned.conv1.out_channels == pruned.layer1[2].conv2.out_channels == 16
    assert {block.conv2.out_channels for block in pruned.layer2} == {24}
    assert {block.conv1.out_channels for block in pruned.layer3} == {48}


def test_around_a_criterion_the_first_candidate_is_its_own_plan(digits: tuple[nn.Module, ImageData]) -> None:
    model, data = digits
    plan = CoarseSelector(candidates=1, proposal="d_score").select(model, data, request())
    own = plan_pruning(model, torch.zeros(1, *SHAPE), "d_score", ratio=0.3)
    assert plan.removals == tuple(r for r in own.removals if r.layer != "features.0")
    more = CoarseSelector(candidates=30, proposal="d_score").select(model, data, request())
    assert more.made_by["winner_mcr"] <= plan.made_by["winner_mcr"]


def test_other_goals_are_met_with_the_same_share_of_every_group(digits: tuple[nn.Module, ImageData]) -> None:
    model, data = digits
    plan = CoarseSelector(candidates=2).select(model, data, request(goal="target_macs", amount=0.6))
    assert 0.57 < plan.macs[1] / plan.macs[0] <= 0.6
    shares = [len(r.indices) / {"features.3": 32}.get(r.layer, 64) for r in plan.removals]
    assert max(shares) - min(shares) < 0.04


def test_the_paper_s_networks() -> None:
    model = create_model("cifar_cnn_small").eval()
    inputs = (torch.zeros(1, 3, 32, 32),)
    groups = [g for g in PruningGraph(model, inputs).prunable if g.name.startswith("features")]
    convolutions = used_convolutions(model, inputs)
    for narrow, wide, removed in ((89, 179, 0.490), (83, 166, 0.554)):  # widths left: sec. 5.1
        counts = {g.name: g.units - (wide if g.units == 256 else narrow) for g in groups}
        counts["features.0"] = 0
        assert channel_weights_removed(convolutions[1:], groups, counts) == pytest.approx(removed, abs=5e-4)


def test_linear_layers_stay_whole_unless_asked() -> None:
    model = network("cifar_cnn_small", widths=((6, 8), (8, 8)), hidden=10, image_size=8)
    data = images_for(model, (3, 8, 8))
    plan = CoarseSelector(candidates=2).select(model, data, request((3, 8, 8)))
    both = CoarseSelector(candidates=2, skip_linear=False).select(model, data, request((3, 8, 8)))
    assert {r.layer for r in both.removals} - {r.layer for r in plan.removals} == {"hidden.0"}
    assert plan.apply(copy.deepcopy(model)).hidden[0].in_features == 6 * 4 * 4


# Kernels ----------------------------------------------------------------------------------------------------


def test_every_convolution_but_the_first_loses_the_same_share_of_its_kernels(
    digits: tuple[nn.Module, ImageData],
) -> None:
    model, data = digits
    plan = CoarseSelector(candidates=7).select(model, data, request(granularity="kernel", amount=0.4))
    sizes = {"features.3": 16 * 32, "features.7": 32 * 64, "features.10": 64 * 64}
    assert all(isinstance(removal, KernelRemoval) for removal in plan.removals)
    gone = {r.layer: torch.tensor(r.indices) for r in plan.removals}
    assert {name: len(places) for name, places in gone.items()} == {
        name: removal_count(0.4, size) for name, size in sizes.items()
    }
    inputs, labels = data.validation.__getitems__(list(range(60)))
    with Masks(model) as masks, torch.no_grad():
        masks.silence(kernels=gone)
        wrong = model(inputs).argmax(1) != labels
    assert plan.made_by["winner_mcr"] == pytest.approx(100 * wrong.double().mean().item(), abs=1e-4)
    total = sum(map(len, gone.values()))
    assert plan.made_by["weights_removed"] == round(total / sum(sizes.values()), 4)
    assert plan.params[0] - plan.params[1] == 9 * total
    # 8x8 images, pooled to 4x4 behind features.3
    saved = 9 * (64 * len(gone["features.3"]) + 16 * (len(gone["features.7"]) + len(gone["features.10"])))
    assert plan.macs[0] - plan.macs[1] == saved == sum(row.macs_saved for row in plan.rows)
    assert {row.layer: row.channels for row in plan.rows} == sizes
    assert Plan.from_dict(plan.to_dict()).removals == plan.removals


def test_kernels_are_drawn_around_a_criterion_that_scores_kernels(
    digits: tuple[nn.Module, ImageData],
) -> None:
    model, data = digits
    selector = CoarseSelector(candidates=1, proposal="synaptic_strength")
    plan = selector.select(model, data, request(granularity="kernel", amount=0.25))
    path = get_criterion("synaptic_strength").kernel_scores
    scores = load_object(path)(model, (torch.zeros(1, *SHAPE),))
    for removal in plan.removals:
        flat = scores[removal.layer].flatten()
        assert flat[list(removal.indices)].max() <= flat.sort().values[len(removal.indices) - 1]


def test_a_second_round_takes_its_share_of_what_the_first_has_left(
    digits: tuple[nn.Module, ImageData],
) -> None:
    model, data = digits
    selector, size = CoarseSelector(candidates=3), 64 * 64
    first = selector.select(model, data, request(granularity="kernel", amount=0.5))
    thinned = first.apply(copy.deepcopy(model))
    second = selector.select(thinned, data, request(granularity="kernel", amount=0.5))
    for removal in first.removals:
        assert not set(removal.indices) & set(second.removed(removal.layer))
    assert len(second.removed("features.10")) == size // 4
    assert second.params[0] == first.params[1]
    assert second.macs[0] == first.macs[1]
    assert second.made_by["weights_removed"] == 0.75
    twice = second.apply(thinned)
    assert int(twice.features[10].weight.flatten(2).any(2).sum()) == size // 4


def test_depthwise_and_fixed_convolutions_keep_their_kernels() -> None:
    model, shape = network("mobilenetv2_100", num_classes=5), (3, 32, 32)
    model.blocks[0][0].conv_pw.weight.requires_grad_(False)
    chosen = CoarseSelector(candidates=1, skip_first=False)
    plan = chosen.select(model, images_for(model, shape), request(shape, "kernel"))
    layers = {row.layer for row in plan.rows}
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    fixed = {name for name, m in convolutions.items() if m.groups > 1 or not m.weight.requires_grad}
    assert layers == set(convolutions) - fixed


# Everything else --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["channel", "kernel"])
def test_the_same_seed_gives_the_same_plan_and_work_is_gone_on_with(
    granularity: str, digits: tuple[nn.Module, ImageData], tmp_path: Path
) -> None:
    model, data = digits
    before = copy.deepcopy(model.state_dict())
    selector = CoarseSelector(candidates=6)
    plans = [
        selector.select(model, data, request(granularity=granularity, seed=seed, work=work))
        for seed, work in ((1, None), (1, tmp_path), (1, tmp_path), (2, tmp_path))
    ]
    assert plans[0] == plans[1] == plans[2]
    assert plans[3].removals != plans[0].removals
    assert len(list(tmp_path.iterdir())) == 2  # each search has a file of its own
    other = CoarseSelector(candidates=6, batch_size=7)  # nor do other options meet its file
    assert other.select(model, data, request(granularity=granularity, seed=1, work=tmp_path)).removals
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"candidates": 0}, BudgetError, "candidates must be"),
        ({"selection_images": 0}, BudgetError, "selection_images"),
        ({"temperature": 0}, BudgetError, "temperature"),
        ({"proposal": "d_scor"}, CriterionError, "did you mean 'd_score'"),
        (
            {"proposal": "taylor"},
            CriterionError,
            "'taylor' does not score channels or kernels by weights alone",
        ),
        ({"colour": "red"}, CriterionError, "colour"),
    ],
)
def test_options_are_checked_when_it_is_built(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        get_criterion("coarse").build_selector(**options)


@pytest.mark.parametrize(
    ("asked", "options", "error", "message"),
    [
        ({"granularity": "layer"}, {}, CriterionError, "channels or kernels; got the granularity 'layer'"),
        ({"granularity": "kernel", "goal": "target_macs"}, {}, BudgetError, "kernels leave by ratio"),
        ({"granularity": "kernel", "amount": 1.0}, {}, BudgetError, "between 0 and 1"),
        ({"granularity": "kernel"}, {"proposal": "d_score"}, CriterionError, "does not score kernels"),
        ({"amount": 0.01}, {}, BudgetError, "nothing would leave"),
    ],
)
def test_what_cannot_be_done_is_refused(
    asked: dict[str, Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    digits: tuple[nn.Module, ImageData],
) -> None:
    with pytest.raises(error, match=message):
        CoarseSelector(**options).select(*digits, request(**asked))


def test_a_network_with_nothing_but_its_first_convolution_is_refused(
    digits: tuple[nn.Module, ImageData],
) -> None:
    data = digits[1]
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    for granularity in ("channel", "kernel"):
        with pytest.raises(ModelError, match="skip_first=False"):
            CoarseSelector().select(model, data, request(granularity=granularity))
    plan = CoarseSelector(candidates=3, skip_first=False).select(model, data, request())
    assert len(plan.removed("0")) == 2
