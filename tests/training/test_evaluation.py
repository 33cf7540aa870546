from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from dscore_plugin.datasets import load_data
from dscore_plugin.errors import DataError, ModelError
from dscore_plugin.models import create_model, load_weights
from dscore_plugin.training.evaluation import evaluate, images_of_statistics, recalibrate_batchnorm
from tests.training.conftest import CLASSES, TinyImages, assert_same_bits, snapshot, tiny_images, tiny_network


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def mixed_modes(model: nn.Module) -> list[bool]:
    model.train()
    model[1].eval()
    return modes(model)


class Recorder(nn.Module):
    """Gives constant logits, and remembers what it saw."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(classes))
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return torch.zeros(len(images), 1) + self.scale


@pytest.mark.parametrize("batch_size", [1, 7, 31, 256])
def test_top1_agrees_with_torchmetrics(validation_images: TinyImages, batch_size: int) -> None:
    model = tiny_network(dropout=0.5)
    metric = MulticlassAccuracy(num_classes=CLASSES, average="micro")
    model.eval()
    metric.update(model(validation_images.images), validation_images.labels)
    result = evaluate(model, validation_images, batch_size=batch_size)
    assert result.top1 == pytest.approx(100 * float(metric.compute()), abs=1e-4)
    assert result.images == 31


def test_evaluation_changes_nothing(validation_images: TinyImages) -> None:
    model = tiny_network(dropout=0.5)
    before, state = mixed_modes(model), snapshot(model)
    evaluate(model, validation_images)
    assert modes(model) == before
    assert_same_bits(model.state_dict(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_is_in_float32_also_under_autocast(validation_images: TinyImages) -> None:
    model = tiny_network()
    kinds: list[Any] = []
    model[0].register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        evaluate(model, validation_images)
    assert set(kinds) == {torch.float32}


def test_modes_come_back_after_an_exception(validation_images: TinyImages) -> None:
    model = tiny_network()
    before = mixed_modes(model)
    model[-1] = nn.Linear(99, CLASSES)
    with pytest.raises(RuntimeError):
        evaluate(model, validation_images)
    assert modes(model) == before


def test_labels_beyond_the_outputs_are_named(validation_images: TinyImages) -> None:
    with pytest.raises(ModelError, match="2 outputs but the data has a label 2"):
        evaluate(Recorder(classes=2), validation_images)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [(lambda x: (x, x), "gave a tuple"), (lambda x: x, r"gave shape \(31, 3, 6, 6\)")],
)
def test_what_is_no_classifier_is_named(validation_images: TinyImages, outputs: Any, message: str) -> None:
    class Odd(nn.Module):
        def forward(self, images: Tensor) -> Any:
            return outputs(images)

    with pytest.raises(ModelError, match=message):
        evaluate(Odd(), validation_images)


def test_an_empty_set_is_refused() -> None:
    for task in (evaluate, recalibrate_batchnorm):
        with pytest.raises(DataError, match="empty"):
            task(tiny_network(), tiny_images(0))


@pytest.mark.parametrize("batch_size", [40, 16, 13, 7])
def test_recalibration_is_the_weighted_mean_over_batches(batch_size: int) -> None:
    """Literally: the batches' statistics, the norm before in train mode too, weighted by their sizes."""
    images = tiny_images(40, augmented=True)
    model = tiny_network()
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, -1, 1)
        nn.init.normal_(norm.running_mean)
    reference = copy.deepcopy(model).train()
    inputs: list[Tensor] = []
    hook = model[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    recalibrate_batchnorm(model, images, count=40, batch_size=batch_size, seed=3)
    hook.remove()
    assert sum(len(batch) for batch in inputs) == 40
    assert max(map(len, inputs)) - min(map(len, inputs)) <= 1
    assert max(map(len, inputs)) <= batch_size
    sums = torch.zeros(2, 5, dtype=torch.float64)
    for batch in inputs:
        before = reference[:4](batch).detach().double()
        sums[0] += len(batch) * before.mean(dim=(0, 2, 3))
        sums[1] += len(batch) * before.var(dim=(0, 2, 3), unbiased=True)
    assert torch.allclose(model[4].running_mean.double(), sums[0] / 40, atol=1e-5)
    assert torch.allclose(model[4].running_var.double(), sums[1] / 40, atol=1e-5)


def test_recalibration_of_one_batch_is_exact() -> None:
    images = tiny_images(20)
    model = tiny_network()
    nn.init.constant_(model[1].running_mean, torch.nan)  # the old statistics leave no trace
    model[1].num_batches_tracked.fill_(77)
    recalibrate_batchnorm(model, images, batch_size=20)
    assert model[1].num_batches_tracked == 1
    first = model[0](images.images).detach()
    assert torch.allclose(model[1].running_mean, first.mean(dim=(0, 2, 3)), atol=1e-6)
    assert torch.allclose(model[1].running_var, first.var(dim=(0, 2, 3)), atol=1e-6)


def test_recalibration_takes_images_as_in_the_first_epoch_chosen_by_seed() -> None:
    train, seen = load_data("digits").train, []
    for seed, epoch in ((0, 0), (0, 5), (1, 0)):
        train.set_epoch(epoch)
        model = nn.Sequential(Recorder(), nn.BatchNorm1d(CLASSES))
        recalibrate_batchnorm(model, train, count=12, batch_size=5, seed=seed)
        seen.append(torch.cat(model[0].seen))
        assert train.epoch == epoch
    assert seen[0].equal(seen[1])
    assert not seen[0].equal(seen[2])
    train.set_epoch(0)
    shown = {image.numpy().tobytes() for image in train.__getitems__(range(len(train)))[0]}
    assert len({image.numpy().tobytes() for image in seen[0]} & shown) == 12


def test_recalibration_mixes_a_set_that_is_stored_class_by_class() -> None:
    images = tiny_images(30)
    images.images = torch.arange(30.0).view(30, 1, 1, 1).expand(30, 3, 6, 6)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    recalibrate_batchnorm(model, images, batch_size=10)
    whole, of_sorted_batches = images.images[:, 0].var(), torch.arange(10.0).var()
    assert abs(model[0].running_var[0] - whole) < abs(model[0].running_var[0] - of_sorted_batches)


def test_recalibration_keeps_modes_momenta_weights_and_dropout_off() -> None:
    model = tiny_network(dropout=0.9)
    model[1].momentum = 0.3
    before, weights = mixed_modes(model), [p.detach().clone() for p in model.parameters()]
    dropped: list[bool] = []
    model[8].register_forward_hook(lambda module, inputs, output: dropped.append(not output.equal(inputs[0])))
    recalibrate_batchnorm(model, tiny_images(20))
    assert modes(model) == before
    assert (model[1].momentum, model[4].momentum) == (0.3, 0.1)
    assert all(p.equal(w) for p, w in zip(model.parameters(), weights, strict=True))
    assert dropped == [False]


def test_recalibration_restores_after_an_exception() -> None:
    model = tiny_network()
    before = mixed_modes(model)
    model[-1] = nn.Linear(99, CLASSES)
    with pytest.raises(RuntimeError):
        recalibrate_batchnorm(model, tiny_images(20))
    assert modes(model) == before
    assert model[1].momentum == 0.1


def test_without_running_statistics_nothing_is_run() -> None:
    model = nn.Sequential(Recorder(), nn.BatchNorm1d(CLASSES, track_running_stats=False))
    recalibrate_batchnorm(model, tiny_images(20))
    assert model[0].seen == []


@pytest.mark.parametrize("option", [{"count": 0}, {"batch_size": 0}])
def test_recalibration_needs_images(option: dict[str, int]) -> None:
    with pytest.raises(DataError, match="expected numbers >= 1"):
        recalibrate_batchnorm(tiny_network(), tiny_images(5), **option)


@pytest.mark.parametrize("augmented", [True, False])
@pytest.mark.parametrize("first", ["norm", "convolution"])
def test_the_form_of_the_images_is_read_off_the_first_norm(augmented: bool, first: str) -> None:
    train = load_data("digits").train
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Identity() if first == "norm" else nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(1 if first == "norm" else 4), nn.Dropout(0.9), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.LazyBatchNorm1d(),
    )  # fmt: skip
    model(train.__getitems__(range(8))[0])
    recalibrate_batchnorm(model, train if augmented else train.plain(), seed=1)
    model[5].running_mean.fill_(99.0)  # what is behind the first plays no part
    before = copy.deepcopy(model.state_dict())
    train.set_epoch(3)
    found = images_of_statistics(model, train)
    assert found.augmented == augmented
    assert train.epoch == 3
    assert len(found) == len(train)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_without_statistics_the_form_is_that_of_training() -> None:
    train = load_data("digits").train
    for norm in (nn.Identity(), nn.BatchNorm2d(1, track_running_stats=False)):
        assert images_of_statistics(nn.Sequential(norm, nn.Flatten()), train) is train
    with pytest.raises(DataError, match="empty"):
        images_of_statistics(tiny_network(), tiny_images(0))


@pytest.mark.cifar10
def test_trained_networks_tell_what_they_were_shown(shared: Path) -> None:
    """The published ResNets saw crops padded with black, this VGG did not (docs/results.md)."""
    train = load_data(f"cifar10:{shared / 'data' / 'cifar10'}").train
    for name, augmented in (("resnet20", True), ("resnet56", True), ("vgg16_bn", False)):
        model = create_model(f"cifar_{name}", num_classes=10)
        load_weights(model, shared / "weights" / "cifar10" / f"{name}.safetensors")
        assert images_of_statistics(model, train).augmented == augmented, name
