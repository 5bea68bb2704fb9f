"""Normalisation layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.context import ParallelContext
from parallel.sharding import Constant, declare_replicated


class RMSNorm(nn.Module):
    """`y = weight * x / sqrt(mean(x^2) + eps)` over the last dimension, in fp32 inside.

    Every tensor rank holds the whole weight. Source: arXiv 1910.07467.
    """

    def __init__(self, hidden_size: int, *, eps: float, ctx: ParallelContext) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=ctx.device))
        declare_replicated(self.weight, Constant(1.0), ctx=ctx)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
