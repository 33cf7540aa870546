"""The controller against lambdas computed by hand, and the regulariser inside the training loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dscore_plugin.criteria.dependency_aware import dependency_aware
from dscore_plugin.errors import TrainingError
from dscore_plugin.training.loop import TrainingConfig, train
from dscore_plugin.training.sparsity import (
    DependencyAwareRegularizer,
    ScoredLayer,
    SparsityController,
    measure_sparsity,
    scaled_delta,
)

from .conftest import TinyImages, assert_same_bits, snapshot, tiny_network

LAYERS = (ScoredLayer("0", "1", ("3",)), ScoredLayer("3", "4", ("9",)))


@pytest.mark.parametrize(
    ("epochs", "initial", "sparsities", "steps"),
    [
        pytest.param(10, 0.0, [0.0, 0.02], [1, 2], id="raised below 0.05 and 0.0533"),
        pytest.param(10, 0.0, [0.0, 0.1, 0.3], [1, 1, 1], id="held: 0.1 >= 0.4 / 9 and 0.2 >= 0.2 / 8"),
        pytest.param(10, 0.2, [0.21, 0.19], [1, 2], id="raised where sparsity falls short or falls"),
        pytest.param(10, 0.3, [0.31], [1], id="the first gain is counted from the initial sparsity"),
        pytest.param(10, 0.0, [0.31], [0], id="... and would be enough from none"),
        pytest.param(5, 0.0, [0.0, 0.0, 0.6, 0.58, 0.62], [1, 2, 1, 1, 0], id="lowered while it still grows"),
        pytest.param(5, 0.0, [0.6, 0.7, 0.8], [0, 0, 0], id="clipped at zero"),
        pytest.param(5, 0.0, [0.0, 0.6, 0.7, 0.1], [1, 0, 0, 1], id="clipped, then raised by one step"),
        pytest.param(5, 0.0, [0.0, 0.5, 0.5], [1, 1, 1], id="held at the target"),
        pytest.param(2, 0.0, [0.0, 0.25], [1, 1], id="held: a gain of 0.25 is just the 0.25 / 1 expected"),
        pytest.param(
            10,
            0.0,
            [0.0, 0.02, 0.10, 0.30, 0.31, 0.55, 0.54, 0.60, 0.70, 0.80],
            [1, 2, 2, 2, 3, 2, 2, 1, 0, 0],
            id="raise, hold, lower, clip",
        ),
    ],
)
def test_lambdas_are_those_computed_by_hand(epochs, initial, sparsities, steps):
    controller = SparsityController(0.5, epochs, delta=1e-5, initial_sparsity=initial)
    assert controller.strength == 0
    assert [controller.update(p) for p in sparsities] == pytest.approx([s * 1e-5 for s in steps], abs=1e-18)


def test_the_controller_ends_with_its_epochs():
    controller = SparsityController(0.5, 1)
    controller.update(0.1)
    with pytest.raises(TrainingError, match="made for 1 epochs"):
        controller.update(0.1)


@pytest.mark.parametrize(
    "arguments", [(0.0, 5, 1e-5), (1.0, 5, 1e-5), (0.5, 0, 1e-5), (0.5, 5, 0.0), (float("nan"), 5, 1e-5)]
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(TrainingError, match="expected|must lie"):
        SparsityController(*arguments)


def test_a_restored_controller_goes_on_as_the_first_would_have():
    sparsities = [0.0, 0.02, 0.10, 0.30, 0.31, 0.55, 0.54, 0.60, 0.70, 0.80]
    whole = SparsityController(0.5, 10, 1e-3)
    expected = [whole.update(p) for p in sparsities]
    first, second = SparsityController(0.5, 10, 1e-3), SparsityController(0.5, 10, 1e-3, initial_sparsity=0.9)
    before = [first.update(p) for p in sparsities[:5]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + [second.update(p) for p in sparsities[5:]] == expected
    with pytest.raises(TrainingError, match="epochs of the sparsity training differs"):
        SparsityController(0.5, 11, 1e-3).load_state_dict(first.state_dict())


def test_the_highest_lambda_that_can_be_reached_is_the_papers():
    assert scaled_delta(160) == 1e-5
    assert scaled_delta(10) == pytest.approx(1.77e-4, rel=0.01)
    for epochs in (2, 10, 40, 300):
        controller = SparsityController(0.5, epochs, scaled_delta(epochs))
        lambdas = [0.0, *(controller.update(0.0) for _ in range(epochs))]
        assert max(lambdas[:epochs]) == pytest.approx(159e-5)
    assert scaled_delta(1) > 0


def test_only_the_scored_scales_feel_the_penalty():
    model = tiny_network()
    model[1].weight.data[:3] = torch.tensor([-1.0, 0.0, 2.0])
    regularizer = DependencyAwareRegularizer(model, LAYERS[:1], target=0.5, epochs=4, delta=0.5)
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    regularizer.after_backward(model)
    assert all(torch.equal(p.grad, plain[name]) for name, p in model.named_parameters())
    numbers = regularizer.end_epoch(model, 0)
    assert numbers == {"lambda": 0.0, "sparsity": measure_sparsity(model, LAYERS[:1]), "target": 0.5}
    regularizer.after_backward(model)
    for name, parameter in model.named_parameters():
        added = parameter.grad - plain[name]
        expected = 0.5 * parameter.detach().sign() if name == "1.weight" else torch.zeros_like(parameter)
        torch.testing.assert_close(added, expected, atol=1e-5, rtol=0)


def test_scores_of_several_consumers_add_up():
    model = tiny_network()
    layer = ScoredLayer("0", "1", ("3", "3"))
    torch.testing.assert_close(layer.scores(model), 2 * dependency_aware(model[1].weight, model[3].weight))


def test_nothing_to_score_is_refused():
    with pytest.raises(TrainingError, match="no batch norm alone feeds"):
        DependencyAwareRegularizer(nn.Sequential(), (), 0.5, 10)


def test_training_steers_towards_the_target(train_images: TinyImages):
    model = tiny_network()
    config = TrainingConfig(
        epochs=12,
        learning_rate=0.1,
        weight_decay=1e-4,
        schedule="constant",
        batch_size=10,
        precision="float32",
    )
    regularizer = DependencyAwareRegularizer(model, LAYERS, target=0.5, epochs=12, delta=0.02)
    result = train(model, train_images, None, config, regularizer=regularizer)
    rows = [record.regularizer for record in result.history]
    assert rows[0]["lambda"] == 0
    assert rows[1]["lambda"] == 0.02
    assert rows[-1]["sparsity"] >= 0.3
    assert rows[-1]["sparsity"] == measure_sparsity(model, LAYERS)


def test_a_resumed_run_has_the_same_lambdas_and_weights(train_images: TinyImages, tmp_path: Path):
    def run(epochs: int, checkpoint: Path | None, resume: bool = False) -> tuple[nn.Module, list[dict]]:
        model = tiny_network()
        config = TrainingConfig(epochs, 0.1, schedule="constant", batch_size=10, precision="float32")
        regularizer = DependencyAwareRegularizer(model, LAYERS, target=0.5, epochs=6, delta=0.02)
        result = train(
            model, train_images, None, config, checkpoint=checkpoint, resume=resume, regularizer=regularizer
        )
        return model, [record.regularizer for record in result.history]

    expected, lambdas = run(6, None)
    run(3, tmp_path / "run")
    actual, again = run(6, tmp_path / "run", resume=True)
    assert again == lambdas
    assert_same_bits(snapshot(actual), snapshot(expected))


def test_a_run_that_scored_other_layers_is_not_continued():
    model = tiny_network()
    state = DependencyAwareRegularizer(model, LAYERS, 0.5, 4).state_dict()
    with pytest.raises(TrainingError, match="scored other layers"):
        DependencyAwareRegularizer(model, LAYERS[:1], 0.5, 4).load_state_dict(state)
