"""One threshold over all kernels of a network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dscore_plugin.costs import count
from dscore_plugin.errors import BudgetError, CriterionError, ModelError
from dscore_plugin.models import create_model
from dscore_plugin.plan import Plan
from dscore_plugin.selection.kernels import plan_kernel_ratios, plan_kernels
from dscore_plugin.surgery.kernels import kernel_masks

IMAGE = (torch.zeros(1, 3, 32, 32),)


def scored(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {n: torch.rand(m.weight.shape[:2], generator=generator) for n, m in convolutions.items()}


def plan(model: nn.Module, scores: dict[str, Tensor], ratio: float, **options: object) -> Plan:
    return plan_kernels(model, IMAGE, scores, ratio=ratio, made_by={"criterion": "test"}, **options)


@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_the_lowest_share_of_all_kernels_leaves(ratio: float) -> None:
    model = create_model("cifar_resnet20")
    scores = scored(model)
    made = plan(model, scores, ratio)
    others = [s.flatten() for name, s in scores.items() if name != "conv1"]
    threshold = torch.cat(others).sort().values[int(ratio * sum(map(len, others)))]
    assert made.removed("conv1") == ()
    for name, score in scores.items():
        if name != "conv1":
            expected = tuple((score.flatten() < threshold).nonzero().flatten().tolist())
            assert made.removed(name) == expected
    assert made.made_by["ratio"] == ratio


def test_numbers_are_the_effective_ones() -> None:
    model = create_model("cifar_resnet20")
    made = plan(model, scored(model), 0.5)
    macs, params = count(model, IMAGE)
    assert (made.macs[0], made.params[0]) == (macs, params)
    gone = {r.layer: len(r.indices) * 9 for r in made.removals}
    assert made.params[1] == params - sum(gone.values())
    sizes = {"layer1": 32 * 32, "layer2": 16 * 16, "layer3": 8 * 8}
    assert made.macs[1] == macs - sum(n * sizes[layer.partition(".")[0]] for layer, n in gone.items())
    made.apply(model)
    again = plan(model, scored(model), 0.5)  # what is gone leaves first, and saves nothing more
    assert again.macs[0] == again.macs[1] == made.macs[1]


def test_every_convolution_keeps_its_strongest_kernels() -> None:
    model = create_model("cifar_resnet20")
    scores = scored(model)
    scores["layer2.1.conv2"] = scores["layer2.1.conv2"] / 1e6
    made = plan(model, scores, 0.9, keep_at_least=3)
    left = set(range(1024)) - set(made.removed("layer2.1.conv2"))
    assert left == set(scores["layer2.1.conv2"].flatten().topk(3).indices.tolist())


def test_several_ratios_in_one_call() -> None:
    model = create_model("cifar_resnet20")
    scores = scored(model)
    plans = plan_kernel_ratios(model, IMAGE, scores, ratios=[0.5, 0.7], made_by={"criterion": "test"})
    assert plans == [plan(model, scores, 0.5), plan(model, scores, 0.7)]
    plans[1].apply(model)
    masks = kernel_masks(model)
    assert 1 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values()) == (
        pytest.approx(0.7, abs=1e-4)
    )


def test_equal_scores_give_the_same_plan_twice() -> None:
    model = create_model("cifar_resnet20")
    scores = {name: torch.ones_like(score) for name, score in scored(model).items()}
    assert plan(model, scores, 0.5) == plan(model, scores, 0.5)


def test_bad_input_is_refused() -> None:
    model = create_model("cifar_resnet20")
    scores = scored(model)
    with pytest.raises(BudgetError):
        plan(model, scores, 1.0)
    with pytest.raises(CriterionError, match=r"'layer1\.0\.conv1' need scores of shape \(16, 16\), got none"):
        plan(model, {n: s for n, s in scores.items() if n != "layer1.0.conv1"}, 0.5)
    with pytest.raises(CriterionError, match="NaN"):
        plan(model, {**scores, "layer1.0.conv1": torch.full((16, 16), float("nan"))}, 0.5)
    single = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(ModelError, match="but the first"):
        plan(single, {"0": torch.ones(4, 3)}, 0.5)
