"""The llama family: its ordered layers, its carry, its loss."""

from __future__ import annotations

import torch
from torch import Tensor

from models.base import LossOutput, ModelFamily, num_scored_in
from models.common.rope import RotaryTable
from models.llama.config import LlamaConfig
from models.llama.counts import forward_flops_per_token, num_parameters
from models.llama.hf import HF
from models.llama.layers import LlamaBlock, LlamaCarry, LlamaEmbedding, LlamaHead
from parallel.carry import Field, LayerSpec
from parallel.context import ParallelContext
from parallel.cross_entropy import vocab_parallel_cross_entropy
from parallel.regions import own_length


def layer_specs(config: LlamaConfig, *, segmented: bool = False) -> list[LayerSpec]:
    """`embedding`, `block_0` ... `block_{L-1}`, `head`."""
    rotary = RotaryTable(
        config.head_size,
        config.max_position_embeddings,
        theta=config.rope_theta,
        scaling=config.rope_scaling,
    )
    tied = {"output.weight": "embedding.tokens.weight"} if config.tie_embeddings else {}
    return [
        LayerSpec(
            "embedding",
            LlamaEmbedding,
            {"config": config, "segmented": segmented},
            recompute=False,
        ),
        *(
            LayerSpec(f"block_{i}", LlamaBlock, {"config": config, "rotary": rotary})
            for i in range(config.num_layers)
        ),
        LayerSpec("head", LlamaHead, {"config": config}, tied=tied, recompute=False),
    ]


def carry_schema(
    config: LlamaConfig,
    ctx: ParallelContext,
    *,
    micro_batch_size: int,
    seq_length: int,
    segmented: bool = False,
) -> LlamaCarry:
    """The shapes that cross a stage boundary on this rank.

    Raises:
        ValueError: sequence parallelism with a sequence that the tensor size does not divide.
    """
    local_length = own_length(seq_length, ctx=ctx)
    shape = (local_length, micro_batch_size, config.hidden_size)
    positions = Field((micro_batch_size, seq_length), torch.int32) if segmented else None
    return LlamaCarry(Field(shape, ctx.precision.dtype, gradient=True), positions)


def token_losses(output: Tensor, labels: Tensor, ctx: ParallelContext) -> Tensor:
    """Cross entropy of every position, fp32 [s, b], 0 where the label is -100.

    `output`: logits [s, b, V/t]; `labels`: int64 [b, s].
    """
    return vocab_parallel_cross_entropy(output, labels, ctx=ctx)


def loss(
    output: Tensor,
    labels: Tensor,
    *,
    config: LlamaConfig,
    ctx: ParallelContext,
    num_scored: Tensor | None = None,
) -> LossOutput:
    """Sum of the cross entropy over `num_scored`, the mean when None; 0 where nothing is scored."""
    if num_scored is None:
        num_scored = num_scored_in(labels)
    total = token_losses(output, labels, ctx).sum() / num_scored
    return LossOutput(total, {"lm_loss": total.detach()})


FAMILY = ModelFamily(
    name="llama",
    config_cls=LlamaConfig,
    layer_specs=layer_specs,
    carry_schema=carry_schema,
    loss=loss,
    loss_names=("lm_loss",),
    token_losses=token_losses,
    flops=forward_flops_per_token,
    num_parameters=num_parameters,
    hf=HF,
)
