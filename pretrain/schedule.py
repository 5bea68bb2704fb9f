"""How long a run is and what its learning rate is at each step. Steps count from 1."""

from __future__ import annotations

import math

from pretrain.config import ConfigError, TrainingConfig


def total_steps(training: TrainingConfig, *, tokens_per_step: int) -> int:
    """The number of optimizer steps: `max_steps`, or the first that has seen `max_tokens`, if less.

    Raises:
        ConfigError: so few that the warmup and the decay do not fit.
    """
    limits = []
    if training.max_steps is not None:
        limits.append(training.max_steps)
    if training.max_tokens is not None:
        limits.append(-(-training.max_tokens // tokens_per_step))
    steps = min(limits)
    ramps = training.warmup_steps + training.decay_steps
    if ramps >= steps:
        raise ConfigError(
            f"training.max_tokens={training.max_tokens} is {steps} steps of {tokens_per_step} "
            f"tokens, warmup_steps + decay_steps={ramps} must be less; shorten the ramps or train "
            "longer"
        )
    return steps


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

    * warmup: step / warmup_steps, so that the first step moves and the last one has the peak.
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
