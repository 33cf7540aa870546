from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscore_plugin.errors import TrainingError
from dscore_plugin.training.config import TrainingConfig, learning_rate_at


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("epochs", True),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("schedule", "cosin"),
        ("precision", "float16"),
        ("gamma", 0.0),
        ("label_smoothing", 1.0),
        ("batch_size", 0),
        ("seed", -1),
        ("validate_every", 0),
        ("workers", -1),
        ("warmup_epochs", 2),
        ("milestones", (1,)),
        ("mixup", -0.1),
        ("mixup", math.inf),
        ("cutmix", math.nan),
        ("ema", 1.0),
        ("ema", -0.1),
        ("accumulate", 0),
        ("accumulate", 1.0),
        ("accumulate", 129),
        ("track", "tensorbord"),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(TrainingError, match=f"^{name}=") as caught:
        TrainingConfig(**{"epochs": 2, name: value})
    assert "\n" not in str(caught.value)


def test_the_nearest_schedule_is_named() -> None:
    with pytest.raises(TrainingError, match="did you mean 'cosine'"):
        TrainingConfig(epochs=1, schedule="cosin")  # type: ignore[arg-type]


def test_the_nearest_tracker_is_named() -> None:
    with pytest.raises(TrainingError, match="did you mean 'tensorboard'"):
        TrainingConfig(epochs=1, track="tensorbord")  # type: ignore[arg-type]


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_pairs_need_an_even_batch(mix: str) -> None:
    with pytest.raises(TrainingError, match="batch_size=7 is odd; mixup and cutmix pair images"):
        TrainingConfig(epochs=1, batch_size=7, **{mix: 0.1})


@pytest.mark.parametrize("milestones", [(), (2, 2), (3, 1), (0, 2)])
def test_steps_need_increasing_milestones(milestones: tuple[int, ...]) -> None:
    with pytest.raises(TrainingError, match="increasing"):
        TrainingConfig(epochs=5, schedule="steps", milestones=milestones)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(TrainingError, match="nesterov"):
        TrainingConfig(epochs=1, momentum=0, nesterov=True)


def test_cosine_starts_at_the_peak_and_falls_to_nothing() -> None:
    config = TrainingConfig(epochs=4, learning_rate=0.3)
    rates = [learning_rate_at(config, step, 10) for step in range(41)]
    assert rates[0] == 0.3
    assert rates[20] == pytest.approx(0.15)
    assert rates[40] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))


def test_warmup_rises_linearly_to_the_peak() -> None:
    config = TrainingConfig(epochs=4, learning_rate=0.4, warmup_epochs=0.5, schedule="constant")
    assert [learning_rate_at(config, step, 8) for step in range(6)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.4, 0.4]
    )


def test_steps_fall_at_the_first_step_after_a_milestone() -> None:
    config = TrainingConfig(epochs=4, learning_rate=1.0, schedule="steps", milestones=(1, 3), gamma=0.1)
    rates = [learning_rate_at(config, step, 5) for step in (0, 4, 5, 14, 15, 19)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@given(
    epochs=st.integers(2, 20),
    steps=st.integers(1, 50),
    warmup=st.floats(0, 1.9),
    schedule=st.sampled_from(["cosine", "steps", "constant"]),
)
def test_the_rate_never_leaves_its_range(epochs: int, steps: int, warmup: float, schedule: Any) -> None:
    milestones = (1,) if schedule == "steps" else ()
    config = TrainingConfig(
        epochs=epochs, learning_rate=0.1, warmup_epochs=warmup, schedule=schedule, milestones=milestones
    )
    rates = [learning_rate_at(config, step, steps) for step in range(epochs * steps)]
    assert all(0 < rate <= 0.1 for rate in rates)
