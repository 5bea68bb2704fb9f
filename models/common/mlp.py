"""Feed-forward layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from parallel.context import ParallelContext
from parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    apply_linear,
    project_together,
)
from parallel.sharding import Normal


class SwiGLU(nn.Module):
    """`y = W_down (silu(W_gate x) * W_up x)`: [s, b, h] -> [s, b, h]. Source: arXiv 2002.05202.

    Tensor ranks share the intermediate dimension; the collectives are those of the two linear
    layers.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        ctx: ParallelContext,
        init: Normal,
        output_init: Normal,
    ) -> None:
        super().__init__()
        self.gate = ColumnParallelLinear(hidden_size, intermediate_size, ctx=ctx, init=init)
        self.up = ColumnParallelLinear(hidden_size, intermediate_size, ctx=ctx, init=init)
        self.down = RowParallelLinear(intermediate_size, hidden_size, ctx=ctx, init=output_init)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project_together(x, self.gate, self.up)
        return apply_linear(self.down, self.activation(gate) * up)

    def activation(self, gate: Tensor) -> Tensor:
        """The function of the gate, elementwise."""
        return F.silu(gate)


class GeGLU(SwiGLU):
    """`y = W_down (gelu(W_gate x) * W_up x)` with the approximation of gelu by tanh, as in Gemma
    (arXiv 2403.08295)."""

    def activation(self, gate: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh")
