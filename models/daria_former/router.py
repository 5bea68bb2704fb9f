"""The context router: what the first layer already says about where tokens should look."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.common.norms import RMSNorm
from models.daria_former.config import DariaFormerConfig
from models.daria_former.modulation import ZERO, replicated
from parallel.context import ParallelContext
from parallel.precision import at_least_fp32
from parallel.regions import gather_sequence


class ContextRouter(nn.Module):
    """`W norm(x) + b` per token of the embedding: a prior for every path's gate in every block, and
    the logit of being worth remembering, which weighs the token when it is pooled into memory.

    [s/t, b, h] -> fp32 [s, b, num_priors], whole on every tensor rank; with the memory path the
    last channel is the segment logit. Causal by construction: no token looks at another. It starts
    at 0.
    """

    def __init__(self, config: DariaFormerConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.ctx = ctx
        size = config.num_priors
        self.norm = RMSNorm(config.hidden_dim, eps=config.norm_eps, ctx=ctx)
        self.weight = replicated((size, config.hidden_dim), ZERO, ctx)
        self.bias = replicated((size,), ZERO, ctx)

    def forward(self, x: Tensor) -> Tensor:
        priors = at_least_fp32(F.linear(self.norm(x), self.weight, self.bias))
        return gather_sequence(priors, ctx=self.ctx)
