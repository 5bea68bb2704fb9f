from __future__ import annotations

import math
from typing import Any

import pytest

from pretrain.config import TrainingConfig
from pretrain.engine.lr_schedule import learning_rate, multiplier


def training(**values: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"batch_size": 1, "lr": 0.5, **values})


def test_warmup_rises_linearly_and_reaches_the_peak_at_its_last_step() -> None:
    for schedule in ("cosine", "constant"):
        factors = [
            multiplier(step, schedule=schedule, total_steps=100, warmup_steps=4)
            for step in (1, 2, 3, 4)
        ]
        assert factors == [0.25, 0.5, 0.75, 1.0]


def test_cosine_is_one_at_the_end_of_warmup_half_way_in_the_middle_and_minimal_at_the_end() -> None:
    def cosine(step: int) -> float:
        return multiplier(step, schedule="cosine", total_steps=110, warmup_steps=10, min_ratio=0.1)

    assert cosine(10) == 1.0
    assert cosine(60) == pytest.approx(0.55, abs=1e-15)
    assert cosine(35) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, abs=1e-15)
    assert cosine(110) == pytest.approx(0.1, abs=1e-15)
    assert cosine(1000) == pytest.approx(0.1, abs=1e-15)
    values = [cosine(step) for step in range(10, 111)]
    assert values == sorted(values, reverse=True)


def test_cosine_without_warmup_starts_below_the_peak_and_ends_at_zero() -> None:
    assert multiplier(1, schedule="cosine", total_steps=2) == pytest.approx(0.5)
    assert multiplier(2, schedule="cosine", total_steps=2) == pytest.approx(0.0, abs=1e-15)
    assert multiplier(1, schedule="cosine", total_steps=1, warmup_steps=1) == 1.0


def test_wsd_is_stable_and_then_falls_linearly_to_the_minimum() -> None:
    def wsd(step: int) -> float:
        return multiplier(
            step, schedule="wsd", total_steps=100, warmup_steps=10, decay_steps=20, min_ratio=0.2
        )

    assert wsd(5) == 0.5
    assert [wsd(step) for step in (10, 50, 80)] == [1.0, 1.0, 1.0]
    assert wsd(81) == pytest.approx(1 - 0.8 / 20)
    assert wsd(90) == pytest.approx(0.6)
    assert wsd(100) == 0.2
    assert wsd(101) == 0.2


def test_constant_stays_at_the_peak() -> None:
    assert multiplier(10**9, schedule="constant", total_steps=10) == 1.0


def test_learning_rate_is_the_multiplier_of_the_configuration_times_the_peak() -> None:
    config = training(
        max_steps=100, schedule="wsd", warmup_steps=10, decay_steps=20, min_lr_ratio=0.2
    )
    assert learning_rate(90, config, total_steps=100) == pytest.approx(0.3)
    assert learning_rate(5, config, total_steps=100) == 0.25
