"""The block of the llama family; embedding, head and carry are those of models.common.decoder.

Shapes: s sequence, b batch, h hidden, t tensor size. Activations are [s, b, h], or [s/t, b, h]
under sequence parallelism.
"""

from __future__ import annotations

from torch import nn

from models.common.cache import KVCache
from models.common.decoder import DecoderCarry, decoder_attention, decoder_mlp, decoder_norm
from models.common.rope import RotaryTable
from models.llama.config import LlamaConfig
from parallel.context import ParallelContext


class LlamaBlock(nn.Module):
    """`x = x + attention(norm(x))`, then `x = x + mlp(norm(x))`.

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
        self.attention_norm = decoder_norm(config, ctx=ctx)
        self.attention = decoder_attention(
            config, rotary=rotary, ctx=ctx, qk_norm=config.qk_norm, window=window
        )
        self.mlp_norm = decoder_norm(config, ctx=ctx)
        self.mlp = decoder_mlp(config, ctx=ctx)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """Empty state for generation."""
        return self.attention.new_cache(batch_size, max_length)

    def forward(self, carry: DecoderCarry, cache: KVCache | None = None) -> DecoderCarry:
        x = carry.hidden
        x = x + self.attention(self.attention_norm(x), positions=carry.positions, cache=cache)
        x = x + self.mlp(self.mlp_norm(x))
        return carry._replace(hidden=x)
