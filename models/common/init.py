"""Parameters with declared sharding, and depth-dependent initialisation."""

from __future__ import annotations

import math

import torch
from torch import nn

from parallel.context import ParallelContext
from parallel.layers import empty_linear
from parallel.sharding import (
    Constant,
    Init,
    Normal,
    Role,
    Sharding,
    declare,
    declare_replicated,
)

_ZERO = Constant(0.0)


def residual_output(std: float, *, num_layers: int) -> Normal:
    """`N(0, (std / sqrt(2 L))^2)` for projections that add to the residual stream.

    A block adds twice, so the variance of the stream does not grow with depth. Source: GPT-2.
    """
    return Normal(std / math.sqrt(2 * num_layers))


def replicated(
    shape: tuple[int, ...], init: Init, ctx: ParallelContext, *, role: Role | None = None
) -> nn.Parameter:
    """Create a parameter replicated over tensor ranks."""
    empty = nn.Parameter(torch.empty(shape, device=ctx.device))
    return declare_replicated(empty, init, ctx=ctx, role=role)


def replicated_linear(
    in_features: int,
    out_features: int,
    *,
    ctx: ParallelContext,
    bias: bool = False,
    init: Init,
    bias_init: Init = _ZERO,
    role: Role = "matrix",
) -> nn.Linear:
    """Create a linear layer whose weights every tensor rank holds whole and applies to its tokens:
    [s/t, b, in] -> [s/t, b, out]. No collective."""
    linear = empty_linear(in_features, out_features, bias=bias, ctx=ctx)
    declare_replicated(linear.get_parameter("weight"), init, ctx=ctx, role=role)
    if bias:
        declare_replicated(linear.get_parameter("bias"), bias_init, ctx=ctx)
    return linear


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
