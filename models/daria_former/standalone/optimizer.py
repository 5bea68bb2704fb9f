"""Parameter groups and learning rate of training in one process."""

from __future__ import annotations

import math

import torch
from torch import nn

from parallel.sharding import role_of


def build_optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    lora_lr: float | None = None,
    emotion_lr: float | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over what is trained, in named groups: the rest, the sites of the emotion state at
    `emotion_lr` (lr by default), adapters at `lora_lr` (10 times lr by default). In each, matrices
    decay (`decay`) and vectors do not (`no_decay`).

    Raises:
        ValueError: nothing is trained, or a rate or decay out of its range.
    """
    rates = {
        "base": lr,
        "emotion": lr if emotion_lr is None else emotion_lr,
        "lora": 10 * lr if lora_lr is None else lora_lr,
    }
    for name, value in {**rates, "weight_decay": weight_decay}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"the {name} rate {value} must be 0 or more, and finite")
    groups = {
        f"{kind}_{decays}": {"params": [], "lr": rate, "weight_decay": decay}
        for kind, rate in rates.items()
        for decays, decay in (("decay", weight_decay), ("no_decay", 0.0))
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = next((kind for kind in ("lora", "emotion") if f".{kind}." in name), "base")
            decays = "no_decay" if role_of(name, parameter) == "vector" else "decay"
            groups[f"{kind}_{decays}"]["params"].append(parameter)  # type: ignore[attr-defined]
    used = [{"name": name, **group} for name, group in groups.items() if group["params"]]
    if not used:
        raise ValueError("no parameter of the model requires a gradient; unfreeze some")
    return torch.optim.AdamW(used, betas=betas, eps=eps)


def build_scheduler(
    optimizer: torch.optim.Optimizer, warmup_steps: int, max_steps: int, min_ratio: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warmup, then a cosine down to `min_ratio` of the learning rate of each group."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
