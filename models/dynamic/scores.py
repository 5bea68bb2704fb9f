"""Router scores, gates, and the predictor of the routing decision.

Scores and gates are fp32 (wider where x is), [s/t, b] for this rank's tokens. Shapes: s sequence,
b batch, h hidden, W window, t tensor size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common.norms import rms_norm
from models.dynamic.config import DynamicConfig
from parallel.context import ParallelContext
from parallel.precision import at_least_fp32
from parallel.sharding import Normal, declare_replicated

# Odd multipliers with many bits, as signed integers.
_MULTIPLIERS = (0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64))


class RouterScores(NamedTuple):
    """`scores`: the ranking of tokens. `gate`: the factor on the block's output."""

    scores: Tensor
    gate: Tensor


def straight_through(gate: Tensor) -> Tensor:
    """Straight-through estimator: the value 1 with the gradient of log gate."""
    return gate / gate.detach()


class LinearScore(nn.Module):
    """`r_t = w . x_t / rms(x_t)`, or `w . x_t` with router_input=raw; w starts N(0, std^2)."""

    def __init__(self, config: DynamicConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.is_raw, self.eps = config.router_input == "raw", config.rms_norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden_size, device=ctx.device))
        declare_replicated(self.weight, Normal(config.router_init_std), ctx=ctx)

    def forward(self, x: Tensor) -> Tensor:
        u = at_least_fp32(x)
        if not self.is_raw:
            u = rms_norm(u, None, eps=self.eps)
        return F.linear(u, self.weight.to(u.dtype).unsqueeze(0)).squeeze(-1)


class Predictor(nn.Module):
    """`p_t = W_2 silu(W_1 x_t)` of a detached x: the logit of token t being chosen.

    Both weights are replicated over tensor ranks.
    """

    def __init__(self, config: DynamicConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        shapes = ((config.predictor_hidden, config.hidden_size), (1, config.predictor_hidden))
        self.up, self.down = (
            nn.Parameter(torch.empty(shape, device=ctx.device)) for shape in shapes
        )
        for weight in (self.up, self.down):
            declare_replicated(weight, Normal(config.init_std), ctx=ctx, role="router")

    def forward(self, x: Tensor) -> Tensor:
        u = F.silu(F.linear(x.detach(), self.up.to(x.dtype)))
        return F.linear(at_least_fp32(u), self.down.to(at_least_fp32(u).dtype)).squeeze(-1)


def random_scores(keys: Tensor, positions: Tensor) -> Tensor:
    """Hash every key and position to a pseudo-random number in [0, 1): fp32 [b, s].

    Keys are the token ids in the first routed layer and `next_keys` after each, so that no layer
    depends on its index. The same at any layout, in a prefill and token by token.
    """
    # Not a multiple of the positions: inductor folds expressions of an arange alone into unbounded
    # integers, where products do not wrap around (torch 2.13).
    hashed = keys * _MULTIPLIERS[0] + positions.long()
    for multiplier in _MULTIPLIERS:
        hashed = (hashed ^ (hashed >> 31)) * multiplier
    return ((hashed >> 40) & 0xFFFFFF).float() * 2.0**-24


def next_keys(keys: Tensor) -> Tensor:
    """The keys for the random scores of the next routed layer: int64 [b, s]."""
    return keys + _MULTIPLIERS[1]
