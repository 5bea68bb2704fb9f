"""AdamW and the learning-rate schedule of standalone training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from parallel.sharding import role_of


def build_optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    *,
    part_rates: Mapping[str, float] | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in named groups.

    `part_rates`: a part of a parameter's name (`lora` for `*.lora.*`) -> its learning rate; the
    first part that matches decides, and the rest is the group `base` at `lr`. In each group
    matrices decay (`<group>_decay`) and vectors do not (`<group>_no_decay`).

    Raises:
        ValueError: nothing is trainable, or a rate or the decay is out of range.
    """
    rates = {"base": lr, **(part_rates or {})}
    for name, value in {"lr": lr, **(part_rates or {}), "weight_decay": weight_decay}.items():
        if not 0 <= value < math.inf:
            raise ValueError(
                f"{name}={value} must be finite and not negative; pass a rate of 0 or more"
            )
    groups: dict[str, dict[str, Any]] = {
        f"{part}_{decays}": {"params": [], "lr": rate, "weight_decay": decay}
        for part, rate in rates.items()
        for decays, decay in (("decay", weight_decay), ("no_decay", 0.0))
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((part for part in part_rates or () if f".{part}." in name), "base")
            decays = "no_decay" if role_of(name, parameter) == "vector" else "decay"
            groups[f"{part}_{decays}"]["params"].append(parameter)
    used = [{"name": name, **group} for name, group in groups.items() if group["params"]]
    if not used:
        raise ValueError("no parameter of the model requires a gradient; unfreeze some")
    return torch.optim.AdamW(used, betas=betas, eps=eps)


def build_scheduler(
    optimizer: torch.optim.Optimizer, warmup_steps: int, max_steps: int, min_ratio: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine decay to `min_ratio` of each group's learning rate."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
