"""Layers of the llama family and the carry that they hand each other.

Shapes: s sequence, b batch, h hidden, V vocabulary, t tensor size. Between layers activations are
[s, b, h], or [s/t, b, h] under sequence parallelism.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from models.base import TokenInputs
from models.common.attention import CausalSelfAttention
from models.common.cache import KVCache
from models.common.init import residual_output
from models.common.mlp import SwiGLU
from models.common.norms import RMSNorm
from models.common.rope import RotaryTable, positions_in_segments
from models.llama.config import LlamaConfig
from parallel.context import ParallelContext
from parallel.layers import VocabParallelEmbedding, VocabParallelHead
from parallel.sharding import Normal


class LlamaCarry(NamedTuple):
    """`hidden`: the residual stream [s, b, h].

    `positions`: int32 [b, s], from 0 in every document of a row, which also says where attention
    ends; None when a row is one document.
    """

    hidden: Any
    positions: Any = None


class LlamaEmbedding(nn.Module):
    """Token ids to the residual stream, and segment ids to positions."""

    def __init__(self, config: LlamaConfig, *, segmented: bool, ctx: ParallelContext) -> None:
        super().__init__()
        self.segmented = segmented
        self.tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, ctx=ctx, init=Normal(config.init_std)
        )

    def forward(self, inputs: TokenInputs) -> LlamaCarry:
        if self.segmented != (inputs.segment_ids is not None):
            raise ValueError(
                f"a llama model with segmented={self.segmented} was given segment_ids="
                f"{'None' if inputs.segment_ids is None else 'a tensor'}; "
                "build the model as the data is"
            )
        hidden = self.tokens(inputs.tokens).transpose(0, 1)
        if inputs.segment_ids is None:
            return LlamaCarry(hidden)
        return LlamaCarry(hidden, positions_in_segments(inputs.segment_ids))


class LlamaBlock(nn.Module):
    """`x = x + attention(norm(x))`, then `x = x + mlp(norm(x))`."""

    def __init__(self, config: LlamaConfig, *, rotary: RotaryTable, ctx: ParallelContext) -> None:
        super().__init__()
        init = Normal(config.init_std)
        output_init = residual_output(config.init_std, num_layers=config.num_layers)
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, ctx=ctx)
        self.attention = CausalSelfAttention(
            config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_size,
            rotary=rotary,
            ctx=ctx,
            init=init,
            output_init=output_init,
            qkv_bias=config.qkv_bias,
        )
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, ctx=ctx)
        self.mlp = SwiGLU(
            config.hidden_size,
            config.intermediate_size,
            ctx=ctx,
            init=init,
            output_init=output_init,
        )

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """Empty state for generation."""
        return self.attention.new_cache(batch_size, max_length)

    def forward(self, carry: LlamaCarry, cache: KVCache | None = None) -> LlamaCarry:
        x = carry.hidden
        x = x + self.attention(self.attention_norm(x), positions=carry.positions, cache=cache)
        x = x + self.mlp(self.mlp_norm(x))
        return carry._replace(hidden=x)


class LlamaHead(nn.Module):
    """Logits `W norm(x)` over this rank's part of the vocabulary: [s, b, ceil(V/t)]."""

    def __init__(self, config: LlamaConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, ctx=ctx)
        self.output = VocabParallelHead(
            config.vocab_size, config.hidden_size, ctx=ctx, init=Normal(config.init_std)
        )

    def forward(self, carry: LlamaCarry) -> Tensor:
        return self.output(self.norm(carry.hidden))
