"""Noise schedules: how much of a token is left at every level of noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.dart.config import DARTConfig

# Offset of the cosine schedule, so that the first steps are not infinitesimal (arXiv 2102.09672).
_OFFSET = 0.008
_LOWEST_BETA, _HIGHEST_BETA = 1e-4, 0.02  # of 1000 steps


def alphas(config: DARTConfig, device: torch.device | None = None) -> Tensor:
    """alpha of levels 0 ... T, fp64 [T + 1], from exactly 1 to exactly 0.

    masked: the probability that a token is not hidden, with t = k / T

        linear 1 - t,  quadratic (1 - t)^2,  cosine cos^2(pi/2 (t + o) / (1 + o)) / cos^2(pi/2 o)

    gaussian: the share of the signal's variance, `prod (1 - beta_k)`; the betas of 1000 steps,
    linear in beta or in its square root, are scaled by 1000 / T, so that level T is noise at every
    T. Source: arXiv 2006.11239, 2102.09672.
    """
    schedule, steps = config.diffusion_schedule, config.diffusion_steps
    t = torch.arange(steps + 1, dtype=torch.float64, device=device) / steps
    if schedule == "cosine":
        values = ((t + _OFFSET) / (1 + _OFFSET) * math.pi / 2).cos().square()
        values = values / values[0]
    elif config.diffusion_type == "masked":
        values = 1.0 - t if schedule == "linear" else (1.0 - t).square()
    else:
        values = _signal(schedule, steps, device)
    values[-1] = 0.0
    return values


def _signal(schedule: str, steps: int, device: torch.device | None) -> Tensor:
    power = 1.0 if schedule == "linear" else 0.5
    ends = _LOWEST_BETA**power, _HIGHEST_BETA**power
    betas = torch.linspace(*ends, steps, dtype=torch.float64, device=device) ** (1.0 / power)
    kept = 1.0 - (betas * 1000.0 / steps).clamp(max=0.999)
    return torch.cat((torch.ones_like(kept[:1]), kept.cumprod(dim=0)))


def level_weights(config: DARTConfig, device: torch.device | None = None) -> Tensor:
    """Weight of a hidden token's cross entropy at every level, fp64 [T + 1].

    masked: `T (alpha_{k-1} - alpha_k) / (1 - alpha_k)`: with k uniform on 1 ... T the expectation
    is the bound on the negative log-likelihood of T steps (arXiv 2406.07524, section 3.2).
    gaussian: 1.
    """
    alpha = alphas(config, device)
    if config.diffusion_type == "gaussian":
        return torch.ones_like(alpha)
    weights = torch.zeros_like(alpha)
    weights[1:] = config.diffusion_steps * (alpha[:-1] - alpha[1:]) / (1.0 - alpha[1:])
    return weights
