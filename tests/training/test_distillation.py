from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from dscore_plugin.errors import ModelError, TrainingError
from dscore_plugin.training.config import TrainingConfig
from dscore_plugin.training.distillation import Teacher, watched
from dscore_plugin.training.loop import train
from tests.training.conftest import TinyImages, assert_same_bits, snapshot, tiny_images, tiny_network

CONFIG = TrainingConfig(epochs=2, learning_rate=0.05, batch_size=16, precision="float32")


def narrow_network() -> nn.Sequential:
    """The pupil: the same layers, fewer channels in the first."""
    torch.manual_seed(5)
    model = tiny_network()
    model[0], model[1], model[3] = nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3, 2, 1)
    return model


def test_the_loss_is_the_papers() -> None:
    teacher, pupil = tiny_network(seed=1).eval(), narrow_network().eval()
    images, labels = tiny_images(7).__getitems__(range(7))
    judge = Teacher(teacher, weight=0.3, temperature=2.0, features=0.7)
    judgement = judge.judge(pupil, images, counted=6)
    with watched(pupil, judgement.layers) as maps:
        logits = pupil(images)[:6]
    hard = functional.cross_entropy(logits, labels[:6], reduction="sum")

    expected = 0.7 * hard
    for own, other in zip(logits, teacher(images)[:6], strict=True):
        p, q = (other / 2).softmax(0), (own / 2).softmax(0)
        expected = expected + 0.3 * 4 * sum(p[i] * (p[i].log() - q[i].log()) for i in range(3))
    assert judgement.layers == ("2", "5")  # the last of each size: behind the ReLUs, 6 x 6 and 3 x 3
    for stop in (3, 6):
        for one, other in zip(pupil[:stop](images)[:6], teacher[:stop](images)[:6], strict=True):
            one, other = one.square().sum(0).flatten(), other.square().sum(0).flatten()
            expected = expected + 0.7 * (one / one.norm() - other / other.norm()).square().sum()

    torch.testing.assert_close(judgement.loss(hard, logits, maps), expected, rtol=1e-4, atol=1e-5)


def test_the_teacher_stays_as_it_is_and_the_pupil_learns_its_answers() -> None:
    images = tiny_images(60)
    teacher = tiny_network(seed=1)
    train(teacher, images, None, replace(CONFIG, epochs=8))
    teacher.train()
    before = snapshot(teacher)
    wrong = TinyImages(images.images, (images.labels + 1) % 3)
    pupil = narrow_network()
    train(pupil, wrong, None, replace(CONFIG, epochs=20, distill=1.0), teacher=teacher)

    assert_same_bits(snapshot(teacher), before)
    assert teacher.training
    assert not any(module._forward_hooks for model in (teacher, pupil) for module in model.modules())
    answers = [model.eval()(images.images).argmax(1) for model in (teacher, pupil)]
    assert (answers[0] == answers[1]).float().mean() > 0.7  # the labels say otherwise, of every image


@pytest.mark.parametrize("options", [{"distill": 0.5}, {"distill_features": 1.0}])
def test_a_resumed_run_ends_with_the_same_weights(options: dict[str, float], tmp_path: Path) -> None:
    images, teacher, config = tiny_images(40), tiny_network(seed=1), replace(CONFIG, epochs=3, **options)
    config = replace(config, schedule="constant")
    whole, parts = narrow_network(), narrow_network()
    train(whole, images, None, config, teacher=teacher)
    train(parts, images, None, replace(config, epochs=1), checkpoint=tmp_path / "c", teacher=teacher)
    parts = narrow_network()
    train(parts, images, None, config, checkpoint=tmp_path / "c", resume=True, teacher=teacher)
    assert_same_bits(snapshot(parts), snapshot(whole))
    plain = narrow_network()
    train(plain, images, None, replace(config, distill=0.0, distill_features=0.0))
    assert not torch.equal(plain[0].weight, whole[0].weight)


def test_bad_input_is_refused() -> None:
    images, model = tiny_images(10), tiny_network()
    with pytest.raises(TrainingError, match="needs a teacher"):
        train(model, images, None, replace(CONFIG, distill=0.5))
    with pytest.raises(TrainingError, match="needs a teacher"):
        train(model, images, None, CONFIG, teacher=copy.deepcopy(model))
    for wrong in ({"distill": 1.5}, {"distill_temperature": 0.0}, {"distill_features": -1.0}):
        with pytest.raises(TrainingError, match=next(iter(wrong))):
            replace(CONFIG, **wrong)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
    with pytest.raises(ModelError, match="feature map"):
        train(flat, images, None, replace(CONFIG, distill_features=1.0), teacher=copy.deepcopy(flat))
