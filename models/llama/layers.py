"""The block of the llama family; embedding, head and carry are those of models.common.decoder.

Shapes: s sequence, b batch, h hidden, t tensor size. Activations are [s, b, h], or [s/t, b, h]
under sequence parallelism.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.base import TokenInputs
from models.common.cache import FixedKVCache, KVCache
from models.common.decoder import (
    DecoderCarry,
    LMHead,
    TokenEmbedding,
    decoder_attention,
    decoder_mlp,
)
from models.common.mlp import GeGLU, SwiGLU
from models.common.norms import RMSNorm
from models.common.rope import RotaryTable
from models.llama.config import LlamaConfig
from parallel.context import ParallelContext


def llama_norm(config: LlamaConfig, *, ctx: ParallelContext) -> RMSNorm:
    """A norm over the hidden dimension."""
    return RMSNorm(
        config.hidden_size,
        eps=config.rms_norm_eps,
        ctx=ctx,
        zero_centered_gamma=config.zero_centered_gamma,
    )


class LlamaEmbedding(TokenEmbedding):
    """The token embeddings, with `scale_embeddings` times `sqrt(h)`."""

    def __init__(self, config: LlamaConfig, *, segmented: bool, ctx: ParallelContext) -> None:
        super().__init__(config, segmented=segmented, ctx=ctx)
        self.scale = (
            torch.tensor(math.sqrt(config.hidden_size)) if config.scale_embeddings else None
        )

    def forward(self, inputs: TokenInputs) -> DecoderCarry:
        carry = super().forward(inputs)
        if self.scale is None:
            return carry
        # Rounded to the dtype of the activations first, as Gemma was trained.
        return carry._replace(hidden=carry.hidden * self.scale.to(carry.hidden.dtype))


class LlamaHead(LMHead):
    """Logits `W norm(x)` over this rank's part of the vocabulary: [s, b, ceil(V/t)]."""

    def __init__(self, config: LlamaConfig, *, ctx: ParallelContext) -> None:
        super().__init__(config, ctx=ctx)
        self.norm = llama_norm(config, ctx=ctx)


class LlamaBlock(nn.Module):
    """`x = x + attention(norm(x))`, then `x = x + mlp(norm(x))`; with `norm_after`
    `x = x + norm(attention(x))`, then `x = x + norm(mlp(x))`.

    `window`: the positions that attention sees, None for all.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        rotary: RotaryTable,
        window: int | None = None,
        ctx: ParallelContext,
    ) -> None:
        super().__init__()
        self.norm_after = config.norm_after
        self.attention_norm = llama_norm(config, ctx=ctx)
        self.attention = decoder_attention(
            config,
            rotary=rotary,
            ctx=ctx,
            qk_norm=bool(config.qk_norm),
            norm_all_heads=config.qk_norm == "all_heads",
            window=window,
        )
        self.mlp_norm = llama_norm(config, ctx=ctx)
        kind = SwiGLU if config.activation == "silu" else GeGLU
        self.mlp = decoder_mlp(config, ctx=ctx, kind=kind)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """Empty state for generation."""
        return self.attention.new_cache(batch_size, max_length)

    def fixed_cache(self, cache: KVCache, position: Tensor) -> FixedKVCache:
        """The cache for compiled steps of one token (models.compiled_decoding)."""
        return cache.fixed(position)

    def forward(
        self, carry: DecoderCarry, cache: KVCache | FixedKVCache | None = None
    ) -> DecoderCarry:
        x = carry.hidden
        x = x + self._attended(x, carry, cache)
        x = x + (self.mlp_norm(self.mlp(x)) if self.norm_after else self.mlp(self.mlp_norm(x)))
        return carry._replace(hidden=x)

    def _attended(
        self, x: Tensor, carry: DecoderCarry, cache: KVCache | FixedKVCache | None
    ) -> Tensor:
        if self.norm_after:
            return self.attention_norm(self.attention(x, positions=carry.positions, cache=cache))
        return self.attention(self.attention_norm(x), positions=carry.positions, cache=cache)
