"""Strengths times unit kernels: the same network, and training that presses strengths towards zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from dscore_plugin.errors import BudgetError, TrainingError
from dscore_plugin.integrations.torch_pruning.synaptic import kernel_scores
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.surgery.kernels import prune_kernels
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.synaptic import (
    SynapticGoal,
    SynapticKernels,
    SynapticRegularizer,
    from_synaptic,
    strengths,
    synaptic_schedule,
    to_synaptic,
)
from tests.architectures import chain, randomised

IMAGE = (torch.zeros(1, 3, 32, 32),)


def assert_converts(model: nn.Module, split: int) -> None:
    """Compare outputs before, in the synaptic form, and after; and the scores before and after."""
    model.eval()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = kernel_scores(model, IMAGE)
    with torch.no_grad():
        expected = model(x)
        limit = 1e-4 * float(expected.abs().max())
        to_synaptic(model, IMAGE)
        assert len(strengths(model)) == split
        torch.testing.assert_close(model(x), expected, atol=limit, rtol=0)
        for name, strength in strengths(model).items():
            if name in before and "body" not in name:
                assert strength.shape == before[name].shape
        from_synaptic(model)
        torch.testing.assert_close(model(x), expected, atol=limit, rtol=0)
    after = kernel_scores(model, IMAGE)
    for name, score in before.items():
        torch.testing.assert_close(after[name], score, atol=1e-3 * float(score.max()), rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "split"),
    [("cifar_preresnet20", 21), ("cifar_resnet18", 19), ("cifar_vgg16_bn", 12), ("cifar_densenet40", 38)],
)
def test_conversion_is_exact(name: str, split: int) -> None:
    assert_converts(randomised(create_model(name)), split)


def test_conversion_is_exact_on_timms_resnet18() -> None:
    assert_converts(randomised(timm.create_model("resnet18", num_classes=10)), 19)


@pytest.mark.cifar10
@pytest.mark.parametrize(
    ("name", "file", "split"),
    [
        ("cifar_resnet20", "resnet20", 18),
        ("cifar_resnet56", "resnet56", 54),
        ("cifar_vgg16_bn", "vgg16_bn", 12),
    ],
)
def test_conversion_is_exact_on_trained_networks(name: str, file: str, split: int, shared: Path) -> None:
    model = create_model(name)
    load_weights(model, shared / "weights" / "cifar10" / f"{file}.safetensors")
    assert_converts(model, split)


def two_layers(activation: nn.Module | None = None) -> nn.Module:
    return randomised(
        chain(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation or nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False),
            nn.BatchNorm2d(5), nn.ReLU(), width=5,
        )()
    )  # fmt: skip


def test_strengths_directions_shifts_and_signs_are_the_papers() -> None:
    model = two_layers()
    gamma, beta = model.body[1].weight.detach().clone(), model.body[1].bias.detach().clone()
    gamma[1], gamma[2] = 1e-9, -0.5
    model.body[1].weight.data.copy_(gamma)
    weight = model.body[3].weight.detach().clone()
    to_synaptic(model, IMAGE)
    scale = gamma.abs()
    scale[1] = 1  # a constant channel: neither beta nor its kernels are touched
    norms = weight.flatten(2).norm(dim=2)
    (strength,) = strengths(model).values()
    torch.testing.assert_close(strength.detach(), norms * scale)
    direction = model.body[3].parametrizations.weight.original1
    torch.testing.assert_close(direction.flatten(2).norm(dim=2), torch.ones(5, 4))
    torch.testing.assert_close(model.body[1].bias.detach(), beta / scale)
    sign = gamma.sign()
    sign[1] = 0
    assert "body.1.weight" in dict(model.named_buffers())
    assert torch.equal(model.body[1].weight, sign)
    from_synaptic(model)
    assert isinstance(model.body[1].weight, nn.Parameter)
    assert type(model.body[3]) is nn.Conv2d
    assert model.body[3].weight.is_leaf


@pytest.mark.parametrize("trained", [True, False])
def test_a_frozen_norm_stays_frozen(trained: bool) -> None:
    model = two_layers()
    for parameter in model.body[1].parameters():
        parameter.requires_grad_(trained)
    from_synaptic(to_synaptic(model, IMAGE))
    assert [parameter.requires_grad for parameter in model.body[1].parameters()] == [trained, trained]


def test_a_kernel_of_zeros_can_come_back() -> None:
    split = SynapticKernels()
    strength, direction = split.right_inverse(torch.zeros(1, 1, 2, 2))
    assert strength.tolist() == [[0.0]]
    assert direction.flatten().tolist() == [0.5] * 4
    assert split(strength + 2, direction).flatten().tolist() == [1.0] * 4


@pytest.mark.parametrize("activation", [nn.GELU(), nn.Sigmoid(), nn.ReLU6()])
def test_other_activations_are_refused(activation: nn.Module) -> None:
    model = two_layers(activation)
    names = set(model.state_dict())
    with pytest.raises(TrainingError, match=r"stands between 'body\.1' and 'body\.3'"):
        to_synaptic(model, IMAGE)
    assert set(model.state_dict()) == names


def test_leaky_relu_is_positively_homogeneous() -> None:
    model = two_layers(nn.LeakyReLU(0.3)).eval()
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(to_synaptic(model, IMAGE)(x), expected)


def test_masked_and_converted_networks_are_refused() -> None:
    model = to_synaptic(two_layers(), IMAGE)
    with pytest.raises(TrainingError, match="parametrised"):
        to_synaptic(model, IMAGE)
    masked = prune_kernels(two_layers(), {"body.3": torch.ones(5, 4, dtype=torch.bool)})
    with pytest.raises(TrainingError, match="lost kernels"):
        to_synaptic(masked, IMAGE)
    with pytest.raises(TrainingError, match="nothing in Chain has a strength"):
        to_synaptic(chain(nn.Conv2d(3, 5, 3), nn.ReLU(), width=5)(), IMAGE)


def test_a_threshold_that_changes_the_outputs_is_refused() -> None:
    model = two_layers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TrainingError, match="would change the outputs"):
        to_synaptic(model, IMAGE, gamma_threshold=10.0)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_penalty_is_lambda_times_the_sign_and_decay_is_taken_back() -> None:
    torch.manual_seed(0)
    model = to_synaptic(two_layers(), IMAGE)
    decay, penalty = 0.1, 0.25
    regularizer = SynapticRegularizer(model, penalty, decay)
    optimiser = torch.optim.SGD(model.parameters(), 1.0, weight_decay=decay)
    original = model.body[3].parametrizations.weight
    original.original0.data[0, 0] = -0.5
    model(torch.randn(4, 3, 12, 12)).square().sum().backward()
    free = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()}
    regularizer.after_backward(model)
    optimiser.step()
    for name, parameter in model.named_parameters():
        value, gradient = free[name]
        if name.endswith("original0"):
            expected = value - gradient - penalty * value.sign()
        elif name.endswith("original1"):
            expected = value - gradient
        else:
            expected = value - gradient - decay * value
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-5, rtol=1e-4)
    numbers = regularizer.end_epoch(model, 0)
    assert numbers["lambda"] == penalty
    assert numbers["l1"] == pytest.approx(float(original.original0.detach().abs().sum()), rel=1e-5)
    other = SynapticRegularizer(model, penalty, decay)
    other.load_state_dict(regularizer.state_dict())
    with pytest.raises(TrainingError, match="cannot resume"):
        SynapticRegularizer(model, 0.5).load_state_dict(regularizer.state_dict())
    with pytest.raises(TrainingError, match="convert it with to_synaptic"):
        SynapticRegularizer(two_layers(), 0.1)


def test_the_papers_schedule() -> None:
    sparse, retraining = synaptic_schedule(seed=3)
    assert (sparse.epochs, sparse.milestones, sparse.batch_size) == (240, (120, 180), 128)
    assert (sparse.learning_rate, sparse.weight_decay, sparse.seed) == (0.1, 1e-4, 3)
    assert (retraining.epochs, retraining.milestones, retraining.learning_rate) == (50, (25, 37), 0.01)
    assert synaptic_schedule(1, 1)[1].schedule == "constant"
    config = TrainingConfig(1)
    with pytest.raises(BudgetError, match="ratio must lie between"):
        SynapticGoal(0.5, config, sweep=(0.9, 1.0)).check()
    with pytest.raises(TrainingError, match="lambda"):
        SynapticGoal(0.5, config, strength=-1.0).check()
