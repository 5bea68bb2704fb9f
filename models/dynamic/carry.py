"""The carry of both families.

Shapes: s sequence, b batch, h hidden, V vocabulary, t tensor size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.dynamic.config import DTFConfig, MoDConfig
from parallel.precision import at_least_fp32


class DynamicCarry(NamedTuple):
    """`hidden`: the residual stream, [s/t, b, h] under sequence parallelism, else [s, b, h].

    `aux`: fp32 [b, entries], losses and measurements of every row, named by MOD_AUX or DTF_AUX.
    `positions`: int32 [b, s], from 0 in every document; None where a row is one document.
    `keys`: int64 [b, s], the keys of the next routed layer's random scores; None if scores are not
    random. `lengths`: int64 [b], as in TokenInputs.
    """

    hidden: Any
    aux: Any
    positions: Any = None
    keys: Any = None
    lengths: Any = None


class DynamicOutput(NamedTuple):
    """`logits` [s, b, V/t]; `aux` as in the carry."""

    logits: Tensor
    aux: Tensor


# Entries of `aux`, per row, as means over the routed layers. Unweighted losses: z-loss of the
# scores, and BCE of the predictor or of the scores as logits. Measurements: the fraction of tokens
# that the causal rule chooses, the fraction of the top k among them, the standard deviation of a
# row's scores, the mean gate. The losses of experts are means over all layers.
EXPERT_AUX = ("expert_balance_loss", "expert_z_loss")
MOD_AUX = (
    "router_z_loss",
    "router_loss",
    "causal_fraction",
    "causal_recall",
    "score_std",
    "gate_mean",
    *EXPERT_AUX,
)
# In addition the loss of the prior and the mean of each criterion.
DTF_AUX = (*MOD_AUX, "prior_loss", "s_ce", "s_cu")


def with_entries(names: tuple[str, ...], entries: dict[str, Tensor]) -> Tensor:
    """fp32 [b, len(names)] with the given entries [b] and 0 elsewhere."""
    zero = torch.zeros_like(next(iter(entries.values())))
    return torch.stack([at_least_fp32(entries.get(name, zero)) for name in names], dim=-1)


def with_expert_losses(
    carry: DynamicCarry, losses: Tensor | None, config: MoDConfig | DTFConfig
) -> DynamicCarry:
    """Add the expert losses of one layer, fp32 [b, 2], to the carry; unchanged if None."""
    if losses is None:
        return carry
    names = MOD_AUX if isinstance(config, MoDConfig) else DTF_AUX
    shares = dict(zip(EXPERT_AUX, (losses / config.num_layers).unbind(dim=-1), strict=True))
    return carry._replace(aux=carry.aux + with_entries(names, shares))
