"""The agiformer family: its ordered layers, its carry and its loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.agiformer.block import HebbianMemory, HybridBlock
from models.agiformer.carry import AUX, AgiformerCarry, AgiformerOutput
from models.agiformer.config import AgiformerConfig
from models.agiformer.counts import forward_flops_per_token, num_parameters
from models.agiformer.encoder import ByteLatentEncoder
from models.agiformer.head import LocalAutoregressiveHead
from models.agiformer.hf.mapping import HF
from models.agiformer.patches import num_packed_patches
from models.agiformer.reasoning import RecurrentReasoningBlock
from models.base import (
    Counts,
    LossOutput,
    ModelFamily,
    ScoreGroups,
    num_scored_in,
    scored_mean,
    token_losses,
)
from parallel.carry import Field, LayerSpec
from parallel.context import ParallelContext
from parallel.regions import local_seq_len


def layer_specs(config: AgiformerConfig, *, segmented: bool = False) -> list[LayerSpec]:
    """`encoder`, `block_0` ... `block_{L-1}`, `reasoning`, `head`."""
    kwargs = {"config": config}
    return [
        LayerSpec("encoder", ByteLatentEncoder, kwargs | {"segmented": segmented}, recompute=False),
        *(LayerSpec(f"block_{i}", HybridBlock, kwargs) for i in range(config.num_layers)),
        LayerSpec("reasoning", RecurrentReasoningBlock, kwargs),
        LayerSpec("head", LocalAutoregressiveHead, kwargs, recompute=False),
    ]


def carry_schema(
    config: AgiformerConfig,
    ctx: ParallelContext,
    *,
    micro_batch_size: int,
    seq_length: int,
    segmented: bool = False,
) -> AgiformerCarry:
    """The shapes that cross a stage boundary on this rank.

    Raises:
        ValueError: a sequence that is no multiple of the patch, or with sequence parallelism of a
            patch for every tensor rank.
    """
    ranks = ctx.tensor.size if ctx.sequence_parallel else 1
    _check_length(config, seq_length, ranks)
    count = config.num_patches(seq_length)
    if segmented:
        count = num_packed_patches(config, seq_length, multiple_of=ranks)
    batch, bytes_ = micro_batch_size, (micro_batch_size, seq_length)
    shape = (local_seq_len(count, ctx=ctx), batch, config.hidden_size)
    return AgiformerCarry(
        hidden=Field(shape, ctx.precision.dtype, gradient=True),
        aux=Field((batch, len(AUX)), torch.float32, gradient=True),
        tokens=Field(bytes_, torch.int64),
        positions=Field(bytes_, torch.int32) if segmented else None,
        patch_positions=Field((batch, count), torch.int32) if segmented else None,
        keys=Field((batch, count), torch.int64) if config.dropout > 0 else None,
    )


def loss(
    output: AgiformerOutput,
    labels: Tensor,
    *,
    config: AgiformerConfig,
    ctx: ParallelContext,
    num_scored: Tensor | None = None,
) -> LossOutput:
    """Cross entropy of the scored bytes, and the weighted ponder cost.

    `first_byte_loss` and `last_byte_loss` are P times the share of the bytes at these places of a
    patch in the cross entropy, which is their mean loss where every place is scored equally often.
    On text a first byte near 0 means that the encoder sees it.
    """
    if num_scored is None:
        num_scored = num_scored_in(labels)
    losses = token_losses(output, labels, ctx)
    lm_loss = losses.sum() / num_scored
    ponder, steps, merged = scored_mean(output.aux, labels, num_scored).unbind()
    total = lm_loss
    if config.halting == "act":
        total = total + config.ponder_loss_weight * ponder
    size, places = config.patch_size, output.places.T
    first, last = (losses.detach() * (places == place) for place in (0, size - 1))
    terms = {
        "lm_loss": lm_loss,
        "ponder_loss": ponder,
        "ponder_steps": steps,
        "merged_documents": merged,
        "first_byte_loss": size * first.sum() / num_scored,
        "last_byte_loss": size * last.sum() / num_scored,
    }
    return LossOutput(total, {name: term.detach() for name, term in terms.items()})


def set_plasticity(model: nn.Module, alpha: float) -> None:
    """Set the plasticity of every memory below `model`.

    Raises:
        ValueError: alpha is not in (0, 1].
    """
    for module in model.modules():
        if isinstance(module, HebbianMemory):
            module.set_plasticity(alpha)


def _check_length(config: AgiformerConfig, seq_length: int, ranks: int) -> None:
    unit = config.patch_size * ranks
    if seq_length % unit:
        of = f"patch_size={config.patch_size}"
        if ranks > 1:
            of += f" x parallel.tensor={ranks}, which sequence_parallel needs"
        raise ValueError(
            f"data.sequence_length={seq_length} is no multiple of {of}; use "
            f"{max(1, seq_length // unit) * unit}"
        )


FAMILY = ModelFamily(
    name="agiformer",
    config_cls=AgiformerConfig,
    layer_specs=layer_specs,
    carry_schema=carry_schema,
    loss=loss,
    loss_names=("lm_loss", *AUX, "first_byte_loss", "last_byte_loss"),
    # In evaluation; a byte near 0 bits would be one that the encoder sees.
    score_groups=ScoreGroups(
        names=lambda config: tuple(f"bits_of_byte_{k + 1}" for k in range(config.patch_size)),
        of=lambda output: output.places,
    ),
    counts=Counts(num_parameters, forward_flops_per_token),
    hf=HF,
)
