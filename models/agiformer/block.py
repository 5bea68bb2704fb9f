"""The block: sliding-window attention and Hebbian memory side by side, then a feed-forward layer.

Shapes: p patches, b batch, h hidden, n heads, E head dimension, t tensor size. Activations between
layers are [p, b, h], or [p/t, b, h] under sequence parallelism; heads are shared by tensor ranks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.agiformer.cache import BlockCache, MemoryCache, rollback_patches
from models.agiformer.carry import AgiformerCarry, dropped
from models.agiformer.config import AgiformerConfig
from models.agiformer.memory.forms import (
    MIN_LOG_DECAY,
    MemoryInputs,
    Remembered,
    chunked_memory,
    normalized,
    positive_features,
    recurrent_memory,
    with_normalizer,
)
from models.agiformer.memory.fused import Kernel, fused_memory, load_kernel
from models.common.attention import check_heads, split_heads, windowed_attention
from models.common.counter_rng import dropout, next_layer
from models.common.init import replicated, replicated_linear, residual_output, row_sharded
from models.common.mlp import SwiGLU
from models.common.norms import RMSNorm, rms_norm
from models.common.rope import Rotation, rotate
from parallel.context import ParallelContext
from parallel.layer_state import kept_in_dtype
from parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    apply_linear,
    project_together,
)
from parallel.precision import at_least_fp32
from parallel.regions import copy_to_tensor_region, gather_sequence
from parallel.sharding import Constant, Normal


class SlidingWindowAttention(nn.Module):
    """Causal attention to the last `window_size` patches, the own one included, with rotary
    positions.

    Takes projections of heads and returns them mixed, [p, b, h/t]; the block projects them back.
    """

    def __init__(self, config: AgiformerConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        check_heads(ctx, num_heads=config.num_heads)
        self.config = config
        self.query, self.key, self.value = (_heads_of(config, ctx) for _ in range(3))

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        return self.query, self.key, self.value

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor | None = None,
        cache: BlockCache | None = None,
    ) -> Tensor:
        """q, k, v [p, b, h/t]; `positions` int32 [b, p] of packed rows."""
        q, k, v = (split_heads(x, self.config.head_dim) for x in (q, k, v))
        start = 0 if cache is None else cache.length
        index = torch.arange(start, start + q.shape[2], device=q.device)
        rotation = rotary_angles(
            index if positions is None else positions.unsqueeze(1),
            self.config.head_dim,
            theta=self.config.rope_theta,
        )
        q, k = rotate(q, rotation), rotate(k, rotation)
        window = self.config.window_size
        if cache is not None:
            reach = zip(cache.local, (k, v), strict=True)
            k, v = (history.extended(x, window - 1) for history, x in reach)
        mixed = windowed_attention(q, k, v, window=window, positions=positions)
        return mixed.permute(2, 0, 1, 3).flatten(2)


class HebbianMemory(nn.Module):
    """A memory that keys write values into, and that forgets by a decay per head (memory/forms.py).

        q = (elu(W_q u) + 1) / sqrt(E),   k = elu(W_k u) + 1,   v = W_v u
        log lambda = clamp(log alpha + log(f + (1 - f) sigmoid(W_d u + b_d)), -20, 0)

    alpha is the plasticity, f the floor. b_d starts at 4, so that the memory begins by keeping.
    alpha is a buffer in fp32 at any precision, saved with the weights, and one tensor, so that a
    stage of a curriculum can change it in compiled code. Everything after the projections is fp32
    or wider.
    """

    plasticity: Tensor

    def __init__(self, config: AgiformerConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        check_heads(ctx, num_heads=config.num_heads)
        self.config = config
        self.query, self.key, self.value = (_heads_of(config, ctx) for _ in range(3))
        self.decay = ColumnParallelLinear(
            config.hidden_size, config.num_heads, ctx=ctx, init=Normal(config.init_std), role="gate"
        )
        self.decay_bias = row_sharded(config.num_heads, (), Constant(4.0), ctx)
        alpha = torch.full((1,), config.plasticity, dtype=torch.float32, device=ctx.device)
        self.register_buffer("plasticity", alpha)
        self.kernel: Kernel | None = None
        if config.cuda_memory_kernel == "fla" and ctx.device.type == "cuda":
            self.kernel = load_kernel(ctx.device)

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        return self.query, self.key, self.value, self.decay

    def set_plasticity(self, alpha: float) -> None:
        """Set alpha; the state of a generation keeps what it has decayed by.

        Raises:
            ValueError: alpha is not in (0, 1].
        """
        if not 0.0 < alpha <= 1.0:
            raise ValueError(
                f"plasticity={alpha} must be above 0 and at most 1; it is the share of the memory "
                "that a patch keeps"
            )
        self.plasticity.fill_(alpha)

    def change_settings(self, settings: Mapping[str, Any]) -> None:
        """Take the plasticity of a stage of the curriculum (parallel.layer_state)."""
        if "plasticity" in settings:
            self.set_plasticity(settings["plasticity"])

    def new_cache(self) -> MemoryCache:
        return MemoryCache(rollback_patches(self.config.patch_size), self.remember)

    def remember(self, inputs: MemoryInputs, state: Tensor | None = None) -> Remembered:
        """Read the memory while writing it: the recurrence for one patch, chunks for more."""
        with _full_precision(inputs.q):
            if inputs.q.shape[2] == 1 and inputs.starts is None:
                return recurrent_memory(inputs, state)
            if self.kernel is not None and inputs.q.dtype == torch.float32:
                return fused_memory(inputs, state, kernel=self.kernel)
            return chunked_memory(inputs, state, chunk=self.config.memory_chunk_size)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        positions: Tensor | None = None,
        cache: MemoryCache | None = None,
    ) -> Tensor:
        """q, k, v [p, b, h/t] and decay [p, b, n/t] -> [p, b, n/t, E], in the dtype of v."""
        dtype = v.dtype
        inputs = self.inputs(q, k, v, decay, positions)
        values = self.remember(inputs).values if cache is None else cache.read(inputs)
        return normalized(values).to(dtype).permute(2, 0, 1, 3)

    def inputs(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, positions: Tensor | None = None
    ) -> MemoryInputs:
        """Features, values with their normaliser and log decays, in fp32 or wider."""
        size = self.config.head_dim
        q, k, v = (at_least_fp32(split_heads(x, size)) for x in (q, k, v))
        return MemoryInputs(
            positive_features(q) / math.sqrt(size),
            positive_features(k),
            with_normalizer(v),
            self.log_decay(decay).permute(1, 2, 0),
            None if positions is None else positions == 0,
        )

    def log_decay(self, decay: Tensor) -> Tensor:
        """log lambda of the projection [p, b, n/t]."""
        logits = at_least_fp32(decay) + at_least_fp32(self.decay_bias)
        floor = self.config.decay_floor
        if floor == 0.0:
            own = F.logsigmoid(logits)
        else:
            own = (floor + (1.0 - floor) * logits.sigmoid()).log()
        return (self.plasticity.to(own.dtype).log() + own).clamp(MIN_LOG_DECAY, 0.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(kept_in_dtype(self, fn), recurse)
        return self


class GatedFusion(nn.Module):
    """`W_o (g a + (1 - g) m)` with `g = sigmoid(w_g u + b_g)` of every patch, 1/2 at first.

    single: a and m are heads, m normalised in each, and W_o, row-parallel, is all that follows.
    triple: a and m have projections of their own, m a norm over h, and W_o acts on the sum, whole
    on every tensor rank, on its own patches under sequence parallelism. Without a memory `W_o a`.
    """

    def __init__(self, config: AgiformerConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.config, self.ctx = config, ctx
        hidden, init = config.hidden_size, Normal(config.init_std)
        output_init = residual_output(config.init_std, num_layers=config.num_layers)
        self.is_triple = config.fusion == "triple"
        row = partial(RowParallelLinear, hidden, hidden, ctx=ctx)
        self.output: nn.Module
        if self.is_triple:
            self.attention = row(init=init)
            self.output = replicated_linear(hidden, hidden, init=output_init, ctx=ctx)
        else:
            self.output = row(init=output_init)
        if not config.has_memory:
            return
        if self.is_triple:
            self.memory = row(init=init)
            self.memory_norm = RMSNorm(hidden, eps=config.rms_norm_eps, ctx=ctx)
        else:
            heads = (config.head_dim,)
            self.gains = row_sharded(config.num_heads, heads, Constant(1.0), ctx, role="vector")
        self.gate = replicated((1, hidden), Constant(0.0), ctx, role="gate")
        self.gate_bias = replicated((1,), Constant(0.0), ctx)

    def forward(self, u: Tensor, a: Tensor, m: Tensor | None, keys: Tensor | None) -> Tensor:
        """u [p/t, b, h], a [p, b, h/t], m [p, b, n/t, E] -> [p/t, b, h]; `keys` for dropout."""
        if m is None:
            return apply_linear(self.output, self.attention(a) if self.is_triple else a)
        gate = F.linear(at_least_fp32(u), at_least_fp32(self.gate), at_least_fp32(self.gate_bias))
        gate = gate.sigmoid().to(a.dtype)
        if self.is_triple:
            a, m = self.attention(a), self.memory(m.flatten(2)).to(u.dtype)
            m = self.memory_norm(m)
            if keys is not None:
                m = dropped(m, keys, self.config.dropout, stream=0, ctx=self.ctx)
            return apply_linear(self.output, m + gate * (a - m))
        gate = copy_to_tensor_region(gather_sequence(gate, ctx=self.ctx), ctx=self.ctx)
        m = rms_norm(m, None, eps=self.config.rms_norm_eps) * self.gains.to(m.dtype)
        m = m.flatten(2)
        if keys is not None:
            first = self.ctx.tensor.rank * m.shape[-1]
            m = dropout(m, keys.T, self.config.dropout, stream=0, first=first)
        return apply_linear(self.output, m + gate * (a - m))


class HybridBlock(nn.Module):
    """`x = x + fuse(attention(u), memory(u))` with `u = norm(x)`, then `x = x + mlp(norm(x))`."""

    def __init__(self, config: AgiformerConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.config = config
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, ctx=ctx)
        self.attention = SlidingWindowAttention(config, ctx=ctx)
        self.memory = HebbianMemory(config, ctx=ctx) if config.has_memory else None
        self.fusion = GatedFusion(config, ctx=ctx)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, ctx=ctx)
        self.mlp = SwiGLU(
            config.hidden_size,
            config.intermediate_size,
            ctx=ctx,
            init=Normal(config.init_std),
            output_init=residual_output(config.init_std, num_layers=config.num_layers),
        )

    def new_cache(self, batch_size: int, max_length: int) -> BlockCache:
        """Empty state for generation, of constant size."""
        return BlockCache(
            patch_size=self.config.patch_size,
            window=self.config.window_size,
            memory=None if self.memory is None else self.memory.new_cache(),
        )

    def forward(self, carry: AgiformerCarry, cache: BlockCache | None = None) -> AgiformerCarry:
        x = carry.hidden
        if len(x) == 0:  # bytes inside a patch
            return carry
        u = self.norm(x)
        projections = self.attention.projections
        if self.memory is not None:
            projections += self.memory.projections
        projected = project_together(u, *projections)
        a = self.attention(*projected[:3], carry.patch_positions, cache)
        m = None
        if self.memory is not None:
            past = None if cache is None else cache.memory
            m = self.memory(*projected[3:], carry.patch_positions, past)
        if cache is not None:
            cache.length += len(x)
        x = x + self.fusion(u, a, m, carry.keys if self.training else None)
        x = x + self.mlp(self.mlp_norm(x))
        keys = None if carry.keys is None else next_layer(carry.keys)
        return carry._replace(hidden=x, keys=keys)


def rotary_angles(positions: Tensor, head_dim: int, *, theta: float) -> Rotation:
    """Rotation of positions [...]: [..., head_dim], fp32, from angles in fp64.

    Computed when needed, without a table: a stream has no last position, and in fp32 the angles of
    patch 250,000 would be off by 0.01.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions.double().unsqueeze(-1) * theta ** (-exponents / head_dim)
    cos, sin = angles.cos().float(), angles.sin().float()
    return Rotation(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def _heads_of(config: AgiformerConfig, ctx: ParallelContext) -> nn.Module:
    init, hidden = Normal(config.init_std), config.hidden_size
    return ColumnParallelLinear(hidden, hidden, ctx=ctx, init=init)


def _full_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Suspend torch.autocast, which would multiply fp32 in bf16 or fp16."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)
