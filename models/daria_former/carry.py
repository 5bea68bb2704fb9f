"""Inputs, carry and output of a Daria-Former.

Shapes: s sequence, b batch, h hidden, E emotion, P paths, t tensor size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from models.daria_former.config import PATHS


class DariaInputs(NamedTuple):
    """Inputs of the first layer; for text alone `models.base.TokenInputs` is accepted, too.

    `tokens` int64 [b, s]; `segment_ids` int32 [b, s] where rows hold several documents; `images`
    [b, c, height, width]; `audio` log-mel [b, n_mels, frames]; `persona` [b, persona_dim] in place
    of the learned one; `emotion` fp32 [b, E], the state that the first token continues.
    """

    tokens: Tensor
    segment_ids: Tensor | None = None
    images: Tensor | None = None
    audio: Tensor | None = None
    persona: Tensor | None = None
    emotion: Tensor | None = None


class DariaCarry(NamedTuple):
    """The carry between the layers.

    `hidden` [s/t, b, h] in the precision of the run (s/t under sequence parallelism, else s).
    `emotion` fp32 [s, b, E]: the state after the latest update site, whole on every rank.
    `priors` fp32 [s, b, num_priors]: gate priors and segment logit of the context router; None
    where a block has one path and so no gates.
    `aux` fp32 [b, len(AUX)]: losses and measurements of every row, see AUX.
    `bank` [m, b or 1, h]: persistent keys, persistent values, persona slots; None without them.
    `modality` [m, b, h]: encoded images and sound.
    `positions` int32 [b, s], from 0 in every document; None where a row is one document.
    `keys` int64 [b, s]: what the next layer draws noise from (models.common.counter_rng);
    None without noise.
    """

    hidden: Any
    emotion: Any
    priors: Any
    aux: Any
    bank: Any = None
    modality: Any = None
    positions: Any = None
    keys: Any = None


class DariaOutput(NamedTuple):
    """`logits` [s, b, V/t]; `aux` as in the carry; `hidden` [s/t, b, h], what the head projects,
    and `emotion` fp32 [s, b, E], the last state of every token."""

    logits: Tensor
    aux: Tensor
    hidden: Tensor
    emotion: Tensor


# Entries of `aux`: unweighted losses, and measurements, per row. The gates are means over the
# layers.
AUX = (
    "gate_loss",
    "memory_loss",
    "emotion_loss",
    "repetition_loss",
    *(f"gate_{path}" for path in PATHS),
    "emotion_variance",
)
