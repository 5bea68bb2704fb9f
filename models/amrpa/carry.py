"""The carry of the amrpa family.

Shapes: s sequence, b batch, h hidden, n query heads, g key and value heads, d head dimension,
V vocabulary, t tensor size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.amrpa.config import AMRPALlamaConfig
from models.amrpa.targets import live_after, plan_layers
from models.common.decoder import decoder_carry_schema
from parallel.carry import Field, Varying
from parallel.context import ParallelContext


class AMRPACarry(NamedTuple):
    """The carry between the layers.

    `hidden`: the residual stream, [s, b, h], or [s/t, b, h] under sequence parallelism. `aux`:
    fp32 [b, len(AUX)], losses and measurements of every row, means over the layers with memory.
    `history`: what remembered layers left for later ones, in the order of the layers. Of each a
    corrected and rotated query [b, n/t, s, d] and keys [b, g/t, s, d] (`history_kind="qk"`), the
    pattern [b, n/t, s, s] (`pattern`), or the output of its attention [b, n/t, s, d] (`context`).
    `positions`: int32 [b, s], from 0 in every document; None where a row is one document. `keys`:
    int64 [b, s], what the next layer draws random numbers from; None if none are drawn. `lengths`:
    int64 [b], as in TokenInputs.
    """

    hidden: Any
    aux: Any
    history: Any
    positions: Any = None
    keys: Any = None
    lengths: Any = None


class AMRPAOutput(NamedTuple):
    """`logits` [s, b, V/t]; `aux` as in the carry."""

    logits: Tensor
    aux: Tensor


# Entries of `aux` and fields of `models.amrpa.memory.Measured`: two losses before their weights,
# and four measurements.
AUX = (
    "diversity_loss",
    "gate_loss",
    "gate_impact",
    "gate_variance",
    "alpha_diversity",
    "memory_contribution",
)


def carry_schema(
    config: AMRPALlamaConfig,
    ctx: ParallelContext,
    *,
    micro_batch_size: int,
    seq_length: int,
    segmented: bool = False,
) -> AMRPACarry:
    """The shapes that cross a stage boundary on this rank; history only where a later layer reads
    it.

    Raises:
        ValueError: sequence parallelism with a sequence that the tensor size does not divide.
    """
    sizes = {"micro_batch_size": micro_batch_size, "seq_length": seq_length}
    dense = decoder_carry_schema(config, ctx, **sizes, segmented=segmented)
    entry = history_entry(config, ctx, **sizes)
    plan = plan_layers(config, config.num_layers)
    history = {
        f"block_{i}": entry * len(live_after(plan, i))
        for i in range(config.num_layers)
        if live_after(plan, i)
    }
    return AMRPACarry(
        hidden=dense.hidden,
        aux=Field((micro_batch_size, len(AUX)), torch.float32, gradient=True),
        history=Varying(history),
        positions=dense.positions,
        keys=Field((micro_batch_size, seq_length), torch.int64) if config.is_random else None,
    )


def history_entry(
    config: AMRPALlamaConfig, ctx: ParallelContext, *, micro_batch_size: int, seq_length: int
) -> tuple[Field, ...]:
    """The entry of one remembered layer in the history on this rank."""

    def field(heads: int, size: int) -> Field:
        shape = (micro_batch_size, heads // ctx.tensor.size, seq_length, size)
        return Field(shape, ctx.precision.dtype, gradient=not config.detach_history)

    if config.history_kind == "pattern":
        return (field(config.num_heads, seq_length),)
    query = field(config.num_heads, config.head_size)
    if config.history_kind == "context":
        return (query,)
    return (query, field(config.num_kv_heads, config.head_size))
