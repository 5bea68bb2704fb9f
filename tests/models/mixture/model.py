"""Layers, carry and loss of the mixture family: its router losses ride in the carry."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.base import (
    Counts,
    LossOutput,
    ModelFamily,
    TokenInputs,
    num_scored_in,
    scored_mean,
    token_losses,
)
from models.common.attention import CausalSelfAttention
from models.common.cache import KVCache
from models.common.norms import RMSNorm
from models.common.rope import RotaryTable, positions_in_segments
from parallel.carry import Field, LayerSpec
from parallel.context import ParallelContext
from parallel.layers import VocabParallelEmbedding, VocabParallelHead
from parallel.moe import MoELayer
from parallel.regions import local_seq_len
from parallel.sharding import Normal
from tests.models.mixture.config import MixtureConfig


class MixtureCarry(NamedTuple):
    hidden: Any
    losses: Any
    positions: Any = None


class Output(NamedTuple):
    logits: Tensor
    losses: Tensor


class Embedding(nn.Module):
    def __init__(self, config: MixtureConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        init = Normal(config.init_std)
        self.tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, ctx=ctx, init=init
        )

    def forward(self, inputs: TokenInputs) -> MixtureCarry:
        hidden = self.tokens(inputs.tokens).transpose(0, 1)
        segments = inputs.segment_ids
        positions = None if segments is None else positions_in_segments(segments)
        return MixtureCarry(
            hidden, torch.zeros(hidden.shape[1], 2, device=hidden.device), positions
        )


class Block(nn.Module):
    def __init__(self, config: MixtureConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        size, init = config.hidden_size, Normal(config.init_std)
        self.attention_norm = RMSNorm(size, eps=1e-5, ctx=ctx)
        self.attention = CausalSelfAttention(
            size, num_heads=config.num_heads, num_kv_heads=config.num_heads,
            head_dim=size // config.num_heads, ctx=ctx, init=init, output_init=init,
            rotary=RotaryTable(size // config.num_heads, config.max_position_embeddings, theta=1e4),
        )  # fmt: skip
        self.norm = RMSNorm(size, eps=1e-5, ctx=ctx)
        self.moe = MoELayer(
            size, config.intermediate_size, num_experts=config.num_experts, top_k=config.top_k,
            capacity_factor=config.capacity_factor, ctx=ctx, init=init, output_init=init,
        )  # fmt: skip

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        return self.attention.new_cache(batch_size, max_length)

    def forward(self, carry: MixtureCarry, cache: KVCache | None = None) -> MixtureCarry:
        x = carry.hidden
        x = x + self.attention(self.attention_norm(x), positions=carry.positions, cache=cache)
        moe = self.moe(self.norm(x))
        losses = carry.losses + torch.stack([moe.load_balancing_loss, moe.z_loss], dim=-1)
        return carry._replace(hidden=x + moe.hidden, losses=losses)


class Head(nn.Module):
    def __init__(self, config: MixtureConfig, *, ctx: ParallelContext) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=1e-5, ctx=ctx)
        self.output = VocabParallelHead(
            config.vocab_size, config.hidden_size, ctx=ctx, init=Normal(config.init_std)
        )

    def forward(self, carry: MixtureCarry) -> Output:
        return Output(self.output(self.norm(carry.hidden)), carry.losses)


def layer_specs(config: MixtureConfig, *, segmented: bool = False) -> list[LayerSpec]:
    names = [f"block_{i}" for i in range(config.num_layers)]
    return [
        LayerSpec("embedding", Embedding, {"config": config}, recompute=False),
        *(LayerSpec(name, Block, {"config": config}) for name in names),
        LayerSpec("head", Head, {"config": config}, recompute=False),
    ]


def carry_schema(
    config: MixtureConfig,
    ctx: ParallelContext,
    *,
    micro_batch_size: int,
    seq_length: int,
    segmented: bool = False,
) -> MixtureCarry:
    shape = (local_seq_len(seq_length, ctx=ctx), micro_batch_size, config.hidden_size)
    return MixtureCarry(
        Field(shape, ctx.precision.dtype, gradient=True),
        Field((micro_batch_size, 2), torch.float32, gradient=True),
        Field((micro_batch_size, seq_length), torch.int32) if segmented else None,
    )


def loss(
    output: Output,
    labels: Tensor,
    *,
    config: MixtureConfig,
    ctx: ParallelContext,
    num_scored: Tensor | None = None,
) -> LossOutput:
    if num_scored is None:
        num_scored = num_scored_in(labels)
    lm_loss = token_losses(output, labels, ctx).sum() / num_scored
    balance, z_loss = scored_mean(output.losses, labels, num_scored)
    total = lm_loss + config.balance_weight * balance + config.z_weight * z_loss
    terms = {"lm_loss": lm_loss, "balance_loss": balance, "expert_z_loss": z_loss}
    return LossOutput(total, {name: term.detach() for name, term in terms.items()})


def _matrices(config: MixtureConfig, num_experts: int) -> int:
    """Parameters of a block's matrices with so many experts."""
    h, f = config.hidden_size, config.intermediate_size
    return 4 * h * h + config.num_experts * h + num_experts * 3 * h * f


def flops(config: MixtureConfig, seq_length: int) -> float:
    linear = config.num_layers * _matrices(config, config.top_k)
    linear += config.vocab_size * config.hidden_size
    attention = config.num_layers * config.hidden_size * (seq_length + 1) / 2
    return 2.0 * linear + 4.0 * attention


def num_parameters(config: MixtureConfig) -> int:
    block = _matrices(config, config.num_experts) + 2 * config.hidden_size
    tables = 2 * config.vocab_size * config.hidden_size
    return tables + config.num_layers * block + config.hidden_size


FAMILY = ModelFamily(
    name="mixture",
    config_cls=MixtureConfig,
    layer_specs=layer_specs,
    carry_schema=carry_schema,
    loss=loss,
    loss_names=("lm_loss", "balance_loss", "expert_z_loss"),
    counts=Counts(num_parameters, flops),
)
