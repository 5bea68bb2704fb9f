"""The parts of a decoder built from a `DecoderConfig`.

A family composes its block from them and uses embedding, head, carry and schema as they are, or
replaces them with its own.

Shapes: s sequence, b batch, h hidden, V vocabulary, t tensor size. Between layers activations are
[s, b, h], or [s/t, b, h] under sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.base import TokenInputs
from models.common.attention import CausalSelfAttention
from models.common.config import DecoderConfig
from models.common.init import residual_output
from models.common.mlp import SwiGLU
from models.common.norms import RMSNorm
from models.common.rope import RotaryTable, positions_in_segments
from parallel.carry import Field, LayerSpec
from parallel.context import ParallelContext
from parallel.cross_entropy import vocab_logits
from parallel.layers import VocabParallelEmbedding, VocabParallelHead
from parallel.regions import local_seq_len
from parallel.sharding import Normal


class DecoderCarry(NamedTuple):
    """`hidden`: the residual stream [s, b, h].

    `positions`: int32 [b, s], from 0 in every document of a row, which also says where attention
    ends; None when a row is one document.
    """

    hidden: Any
    positions: Any = None


def decoder_carry_schema(
    config: DecoderConfig,
    ctx: ParallelContext,
    *,
    micro_batch_size: int,
    seq_length: int,
    segmented: bool = False,
) -> DecoderCarry:
    """The shapes that cross a stage boundary on this rank.

    Raises:
        ValueError: sequence parallelism with a sequence that the tensor size does not divide.
    """
    shape = (local_seq_len(seq_length, ctx=ctx), micro_batch_size, config.hidden_size)
    positions = Field((micro_batch_size, seq_length), torch.int32) if segmented else None
    return DecoderCarry(Field(shape, ctx.precision.dtype, gradient=True), positions)


def embed_tokens(table: nn.Module, inputs: Any, *, segmented: bool) -> DecoderCarry:
    """Look up the token embeddings, and the positions of tokens in their documents.

    `inputs`: `tokens` int64 [b, s] and `segment_ids` int32 [b, s] or None. `segmented`: whether
    the model was built for rows of several documents.

    Raises:
        ValueError: segment ids are given to a model built without them, or missing.
    """
    if segmented != (inputs.segment_ids is not None):
        raise ValueError(
            f"a model with segmented={segmented} was given segment_ids="
            f"{'None' if inputs.segment_ids is None else 'a tensor'}; "
            "build the model to match the data"
        )
    hidden = table(inputs.tokens).transpose(0, 1)
    if inputs.segment_ids is None:
        return DecoderCarry(hidden)
    return DecoderCarry(hidden, positions_in_segments(inputs.segment_ids))


def decoder_table(config: DecoderConfig, *, ctx: ParallelContext) -> VocabParallelEmbedding:
    """The token table [V, h]."""
    init = Normal(config.init_std)
    return VocabParallelEmbedding(config.vocab_size, config.hidden_size, ctx=ctx, init=init)


def decoder_output(config: DecoderConfig, *, ctx: ParallelContext) -> nn.Module:
    """The projection to the vocabulary, [V, h]."""
    init = Normal(config.init_std)
    return VocabParallelHead(config.vocab_size, config.hidden_size, ctx=ctx, init=init)


def decoder_norm(config: DecoderConfig, *, ctx: ParallelContext) -> RMSNorm:
    """A norm over the hidden dimension."""
    return RMSNorm(config.hidden_size, eps=config.rms_norm_eps, ctx=ctx)


def decoder_attention(
    config: DecoderConfig,
    *,
    rotary: RotaryTable,
    ctx: ParallelContext,
    qk_norm: bool = False,
    norm_all_heads: bool = False,
    window: int | None = None,
) -> CausalSelfAttention:
    """Grouped-query attention whose output projection adds to the residual stream."""
    return CausalSelfAttention(
        config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_size,
        rotary=rotary,
        ctx=ctx,
        init=Normal(config.init_std),
        output_init=residual_output(config.init_std, num_layers=config.num_layers),
        qkv_bias=config.qkv_bias,
        qk_norm_eps=config.rms_norm_eps if qk_norm else None,
        norm_all_heads=norm_all_heads,
        window=window,
    )


def decoder_mlp(
    config: DecoderConfig, *, ctx: ParallelContext, kind: type[SwiGLU] = SwiGLU
) -> SwiGLU:
    """The feed-forward layer of a block; its last projection adds to the residual stream."""
    return kind(
        config.hidden_size,
        config.intermediate_size,
        ctx=ctx,
        init=Normal(config.init_std),
        output_init=residual_output(config.init_std, num_layers=config.num_layers),
    )


def decoder_rotary(config: DecoderConfig) -> RotaryTable:
    """The rotary table, one object for all layers of a model."""
    return RotaryTable(
        config.head_size,
        config.max_position_embeddings,
        theta=config.rope_theta,
        scaling=config.rope_scaling,
    )


class TokenEmbedding(nn.Module):
    """Map token ids to the residual stream, and segment ids to positions."""

    def __init__(self, config: DecoderConfig, *, segmented: bool, ctx: ParallelContext) -> None:
        super().__init__()
        self.segmented = segmented
        self.tokens = decoder_table(config, ctx=ctx)

    def forward(self, inputs: TokenInputs) -> DecoderCarry:
        return embed_tokens(self.tokens, inputs, segmented=self.segmented)


class LMHead(nn.Module):
    """Logits `W norm(x)` over this rank's part of the vocabulary: [s, b, ceil(V/t)]."""

    def __init__(self, config: DecoderConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.norm = decoder_norm(config, ctx=ctx)
        self.output = decoder_output(config, ctx=ctx)

    def forward(self, carry: DecoderCarry) -> Tensor:
        return vocab_logits(self.output, self.norm(carry.hidden))


def decoder_specs(
    config: Any,
    blocks: Sequence[LayerSpec],
    *,
    segmented: bool,
    tied: bool,
    embedding: type[nn.Module] = TokenEmbedding,
    head: type[nn.Module] = LMHead,
) -> list[LayerSpec]:
    """The layers `embedding`, the blocks, `head`.

    `tied`: `head.output.weight` is `embedding.tokens.weight`. Activation recomputation applies to
    the blocks alone.
    """
    return [
        LayerSpec(
            "embedding", embedding, {"config": config, "segmented": segmented}, recompute=False
        ),
        *blocks,
        LayerSpec(
            "head",
            head,
            {"config": config},
            tied={"output.weight": "embedding.tokens.weight"} if tied else {},
            recompute=False,
        ),
    ]
