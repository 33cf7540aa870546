from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target

from dscore_plugin.randomness import own_random_numbers
from dscore_plugin.training.batches import MIXING, stream_seed
from dscore_plugin.training.mixing import Mixer, mixed_targets

ALPHAS = [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)]


def images_and_labels(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.randint(4, (count,), generator=generator)


@pytest.mark.parametrize(("mixup", "cutmix"), ALPHAS)
def test_images_and_targets_are_timms(mixup: float, cutmix: float) -> None:
    for step in range(8):
        images, labels = images_and_labels()
        wanted = images.clone()
        np.random.seed(stream_seed(7, 2, step, MIXING))
        wanted, targets = Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=4)(wanted, labels)
        shares = Mixer(mixup, cutmix, seed=7)(images, epoch=2, step=step)
        assert images.equal(wanted)
        assert torch.allclose(mixed_targets(shares, labels, 4), targets, atol=1e-6)


def test_smoothing_behind_the_mixture_is_timms_before_it() -> None:
    _, labels = images_and_labels()
    logits = torch.randn(6, 4)
    shares = 0.3 * torch.eye(6) + 0.7 * torch.eye(6).flip(0)
    found = torch.nn.functional.cross_entropy(logits, mixed_targets(shares, labels, 4), label_smoothing=0.1)
    smoothed = mixup_target(labels, 4, 0.3, 0.1)
    assert found.item() == pytest.approx(-(smoothed * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5)


def test_a_share_tells_how_much_of_an_image_is_in_another() -> None:
    """Constant images, the i-th of value i, show the shares; cutmix shows them as areas."""
    for mixup, cutmix in ALPHAS:
        images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 8, 8).clone()
        shares = Mixer(mixup, cutmix, seed=3)(images, epoch=0, step=1)
        assert torch.allclose(shares.sum(dim=1), torch.ones(6))
        assert torch.allclose(images.mean(dim=(1, 2, 3)), shares @ torch.arange(6.0), atol=1e-5)
        assert not shares.equal(torch.eye(6))


def test_the_mixture_depends_on_seed_epoch_and_step_alone() -> None:
    found = {}
    for key in [(s, e, n) for s in range(2) for e in range(2) for n in range(3)]:
        for _ in range(2):
            torch.rand(3), np.random.rand(), random.random()
            images, _ = images_and_labels()
            shares = Mixer(0.4, 0.0, seed=key[0])(images, *key[1:])
            assert found.setdefault(key, shares).equal(shares)
    assert len({float(shares[0, 0]) for shares in found.values()}) == len(found)


def test_a_part_of_the_pairs_is_mixed_as_the_whole() -> None:
    images, _ = images_and_labels(8)
    part = images[[1, 3, 4, 6]]  # pairs (1, 6) and (3, 4)
    Mixer(0.4, 1.0, seed=0)(images, 0, 0)
    Mixer(0.4, 1.0, seed=0)(part, 0, 0)
    assert part.equal(images[[1, 3, 4, 6]])


def test_random_numbers_on_loan_come_back() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed() -> None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seed()
    expected = [draw(), draw()]
    seed()
    found = [draw()]
    lent = []
    for _ in range(2):
        with contextlib.suppress(KeyError), own_random_numbers() as reseed:
            reseed(5)
            lent.append(draw())
            raise KeyError
    found.append(draw())
    assert found == expected
    assert lent[0] == lent[1] != expected[0]
