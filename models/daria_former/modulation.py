"""Modulation of a block by the emotion state, and its fusion into the residual stream.

Shapes: s sequence, b batch, h hidden, E emotion, F feed-forward, R rank, t tensor size. Activations
are [s, b, .], or [s/t, b, .] under sequence parallelism; "own" is the emotion state of these tokens
only. Everything that depends on the state is initialised to zero: a new block is a plain one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common.init import replicated, row_sharded
from models.common.manual_backward import multiply_add
from models.common.norms import inverse_rms
from models.daria_former.config import DariaFormerConfig
from models.daria_former.manual_backward import adaptive_norm, fuse, gated_update
from parallel.context import ParallelContext
from parallel.layers import ColumnParallelLinear, RowParallelLinear, apply_linear, project_together
from parallel.regions import copy_to_tensor_region
from parallel.sharding import Constant, Normal

ZERO = Constant(0.0)


class AdaptiveNorm(nn.Module):
    """`y = norm(x) * (1 + W_g e) + W_b e`, with RMSNorm or LayerNorm inside; per token."""

    def __init__(self, config: DariaFormerConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        hidden = config.hidden_dim
        self.eps, self.kind = config.norm_eps, config.norm_type
        self.weight = replicated((hidden,), Constant(1.0), ctx)
        self.bias = replicated((hidden,), ZERO, ctx) if self.kind == "layer" else None
        self.scale = replicated((hidden, config.emotion_dim), ZERO, ctx)
        self.shift = replicated((hidden, config.emotion_dim), ZERO, ctx)

    def forward(self, x: Tensor, own: Tensor) -> Tensor:
        """x [s, b, h] and the state of its tokens [s, b, E]."""
        if self.kind == "rms":
            return adaptive_norm(x, own, self.weight, self.scale, self.shift, eps=self.eps)
        normed = F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        own = own.to(x.dtype)
        return multiply_add(normed + F.linear(own, self.shift), normed, F.linear(own, self.scale))


class EmotionModulatedFFN(nn.Module):
    """`W_down (silu(W_gate x + W_e e + b) * W_up x)`, or `W_down act(W_up x + W_e e + b)`.

    x [s, b, h]; the state e [s, b, E] is whole. Tensor ranks share the intermediate dimension, that
    of W_e too. Any module that is called as `ffn(x, emotion)` can stand in its place.
    """

    def __init__(
        self, config: DariaFormerConfig, *, output_init: Normal, ctx: ParallelContext
    ) -> None:
        super().__init__()
        self.ctx, self.activation = ctx, config.ffn_activation
        hidden, size, init = config.hidden_dim, config.ffn_size, Normal(config.initializer_range)
        if self.activation == "swiglu":
            self.gate_proj = ColumnParallelLinear(hidden, size, ctx=ctx, init=init)
        self.up_proj = ColumnParallelLinear(hidden, size, ctx=ctx, init=init)
        self.down_proj = RowParallelLinear(size, hidden, ctx=ctx, init=output_init)
        self.emotion = row_sharded(size, (config.emotion_dim,), ZERO, ctx)
        self.emotion_bias = row_sharded(size, (), ZERO, ctx)

    def forward(self, x: Tensor, emotion: Tensor) -> Tensor:
        emotion = copy_to_tensor_region(emotion.to(x.dtype), ctx=self.ctx)
        emotion = F.pad(emotion, (0, 1), value=1.0)  # the bias as one more column
        weight = torch.cat((self.emotion, self.emotion_bias.unsqueeze(1)), dim=1)

        def moved(hidden: Tensor) -> Tensor:
            # torch.addmm would begin with a copy of the hidden layer.
            return F.linear(emotion, weight).add_(hidden)

        if self.activation == "swiglu":
            gate, up = project_together(x, self.gate_proj, self.up_proj)
            return apply_linear(self.down_proj, F.silu(moved(gate)) * up)
        (up,) = project_together(x, self.up_proj)
        act = F.gelu if self.activation == "gelu" else F.relu
        return apply_linear(self.down_proj, act(moved(up)))


class ResidualFusion(nn.Module):
    """`u = g_1 a + g_2 f + g_3 norm(x)`, `g = 2 softmax(W [a; f; norm(x)] + b)`: [s, b, h] each.

    W starts at 0 and b at (0, 0, -4), so that u = .99 (a + f) + .02 norm(x) at first. The skip is
    normalised: adding x itself again would make the stream grow by a factor with every layer.
    """

    def __init__(self, config: DariaFormerConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.gate = replicated((3, 3 * config.hidden_dim), ZERO, ctx)
        self.bias = replicated((3,), _fusion_bias, ctx)

    def forward(self, attended: Tensor, fed: Tensor, x: Tensor) -> Tensor:
        return fuse(attended, fed, x, self.gate, self.bias, eps=self.eps)


class RhythmGate(nn.Module):
    """`x + 2 sigmoid(W_2 W_1 phi + b) * u`, `phi = [norm(u); mean(u); log(1 + var(u))]`: [s, b, h].

    The share of u that a block writes, per channel; all of it at initialisation. `rhythm_rank` 0
    gives a full matrix.
    """

    def __init__(self, config: DariaFormerConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        hidden, rank = config.hidden_dim, config.rhythm_rank
        self.eps = config.norm_eps
        width = rank or hidden
        first = Normal(config.initializer_range) if rank else ZERO
        self.down = replicated((width, hidden), first, ctx)
        self.statistics = replicated((width, 2), first, ctx)
        self.up = replicated((hidden, rank), ZERO, ctx) if rank else None
        self.bias = replicated((hidden,), ZERO, ctx)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        if self.up is not None:
            weights = (self.down, self.statistics, self.up, self.bias)
            return gated_update(x, u, *weights, eps=self.eps)
        inverse = inverse_rms(u, eps=self.eps)
        mean = u.mean(dim=-1, keepdim=True, dtype=inverse.dtype)
        variance = (inverse.pow(-2) - self.eps - mean.square()).clamp(min=0.0)
        statistics = torch.cat((mean, variance.log1p()), dim=-1).to(u.dtype)
        features = inverse.to(u.dtype) * F.linear(u, self.down)
        features = features + F.linear(statistics, self.statistics)
        return multiply_add(x, u, (features + self.bias).sigmoid(), scale=2.0)


class ConversationRhythmLayer(nn.Module):
    """`x + 0.1 (V_2 V_1 x) * (w_s n + b_s)` with `n = sigmoid(w_n x)`, and noise in training.

    Structured variation after the last block: a low-rank projection, scaled by the state. The noise
    is `sigmoid(U_2 U_1 x - 2) * N(0, rhythm_noise_std^2)`. [s, b, h].
    """

    def __init__(self, config: DariaFormerConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        hidden, rank = config.hidden_dim, config.rhythm_rank or config.hidden_dim
        init = Normal(config.initializer_range)
        self.noise_std = config.rhythm_noise_std
        self.down = replicated((rank, hidden), init, ctx)
        self.up = replicated((hidden, rank), ZERO, ctx)
        self.need = replicated((1, hidden), ZERO, ctx)
        self.scale = replicated((hidden,), Constant(1.0), ctx)
        self.bias = replicated((hidden,), ZERO, ctx)
        if self.noise_std:
            self.noise_down = replicated((rank, hidden), init, ctx)
            self.noise_up = replicated((hidden, rank), ZERO, ctx)

    def forward(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """`noise`: standard normal numbers of the shape of x, or None outside training."""
        need = F.linear(x, self.need).sigmoid()
        varied = F.linear(F.linear(x, self.down), self.up)
        y = multiply_add(x, varied, need * self.scale + self.bias, scale=0.1)
        if noise is None or not self.noise_std:
            return y
        amount = (F.linear(F.linear(x, self.noise_down), self.noise_up) - 2.0).sigmoid()
        return multiply_add(y, amount, noise.to(x.dtype), scale=self.noise_std)


def _fusion_bias(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.tensor([0.0, 0.0, -4.0])
