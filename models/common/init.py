"""Parameters with declared sharding, and depth-dependent initialisation."""

from __future__ import annotations

import math

import torch
from torch import nn

from parallel.context import ParallelContext
from parallel.sharding import Init, Normal, Role, Sharding, declare, declare_replicated


def residual_output(std: float, *, num_layers: int) -> Normal:
    """`N(0, (std / sqrt(2 L))^2)` for projections that add to the residual stream.

    A block adds twice, so the variance of the stream does not grow with depth. Source: GPT-2.
    """
    return Normal(std / math.sqrt(2 * num_layers))


def replicated(shape: tuple[int, ...], init: Init, ctx: ParallelContext) -> nn.Parameter:
    """Create a parameter replicated over tensor ranks."""
    return declare_replicated(nn.Parameter(torch.empty(shape, device=ctx.device)), init, ctx=ctx)


def row_sharded(
    num_rows: int,
    shape: tuple[int, ...],
    init: Init,
    ctx: ParallelContext,
    *,
    role: Role | None = None,
) -> nn.Parameter:
    """Create a parameter [num_rows, *shape] (one row per head, say) sharded by rows."""
    local = torch.empty((num_rows // ctx.tensor.size, *shape), device=ctx.device)
    return declare(nn.Parameter(local), Sharding(dim=0, full_size=num_rows), init, role=role)
