"""The learning rate of each step. Steps count from 1."""

from __future__ import annotations

import math

from pretrain.config import TrainingConfig


def learning_rate(step: int, training: TrainingConfig, *, total_steps: int) -> float:
    """The learning rate of optimizer step `step`, 1 <= step <= total_steps."""
    return training.lr * multiplier(
        step,
        schedule=training.schedule,
        total_steps=total_steps,
        warmup_steps=training.warmup_steps,
        decay_steps=training.decay_steps,
        min_ratio=training.min_lr_ratio,
    )


def multiplier(
    step: int,
    *,
    schedule: str,
    total_steps: int,
    warmup_steps: int = 0,
    decay_steps: int = 0,
    min_ratio: float = 0.0,
) -> float:
    """The factor on the peak learning rate.

    * warmup: step / warmup_steps: positive at the first step, the peak at the last.
    * cosine: min + (1 - min) (1 + cos(pi p)) / 2, p going from 0 at the end of the warmup to 1.
    * wsd: 1, then over the last `decay_steps` linearly down to min (Hu et al. 2024, section 4).
    * constant: 1.

    Both decays reach `min_ratio` exactly at `total_steps` and stay there.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "cosine":
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "wsd":
        remaining = max(0, total_steps - step)
        return min_ratio + (1 - min_ratio) * min(1.0, remaining / decay_steps)
    return 1.0
