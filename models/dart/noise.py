"""Noise of a training row, drawn once in the first layer from the text itself.

Place i of both streams belongs to the prediction of token i + 1, as in every family. Block b of a
document holds places bB ... bB + B - 1, B the block size, so it hides tokens bB + 1 ... (b + 1)B.
What is drawn for a block is a hash of the row up to its first place: it depends on no token that
the block hides, and on none that the causal stream has not read at that place. The same rows get
the same noise at any layout and after a resume; `salt` gives other numbers.

Shapes: s sequence, b batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.common.counter_rng import STREAMS, prefix_keys, uniform
from models.dart.config import DARTConfig
from models.dart.schedule import alphas

# What a place counts for (`Noise.targets`).
UNSCORED, DIFFUSION, DRAFT = 0, 1, 2
# Streams of random numbers of a block; a token's noise has the last one.
_CONTEXT, _LEVEL, NORMAL = range(3)
# Between the keys of a block's tokens, as between those of layers.
_TOKEN = STREAMS << 32


class Noise(NamedTuple):
    """Noise of a call's places, each [b, s].

    `levels` int32: 1 ... T. `hidden` bool: places that show no token. `targets` int32: whether the
    place counts for the diffusion loss, the draft loss or neither. `positions` int32: from 0 where
    the visible context begins, or None in a row of one document without hidden context. `keys`
    int64: of the normal noise.
    """

    levels: Tensor
    hidden: Tensor
    targets: Tensor
    positions: Tensor | None
    keys: Tensor


def draw_noise(
    tokens: Tensor, positions: Tensor | None, *, config: DARTConfig, salt: Any = 0
) -> Noise:
    """Noise of training rows `tokens` int64 [b, s]; `positions` int32 [b, s] if they are packed.

    A block's level is uniform on 1 ... T; with probability `p_plan` it is T and the block is a
    draft. A token is hidden with probability 1 - alpha. Where the following token is not in the
    row or not in the document, the place is hidden and unscored, except at level T, where
    everything is hidden. `salt`: an int, or int64 [b, 1] for other draws of every row.
    """
    # Not per document: documents that begin with the same token would share their first noise.
    keys = prefix_keys(tokens, None) + (salt << 48)
    index = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)
    places = index.expand_as(tokens) if positions is None else positions
    follows = F.pad(places[:, 1:] == places[:, :-1] + 1, (0, 1), value=False)
    if config.p_uncond > 0:
        places = positions = _hide_context(places, index, keys, config)
    offsets = places % config.block_size
    keys = keys.gather(1, (index - offsets).long())
    level, plan = uniform(keys, 2, stream=_LEVEL).unbind(-1)
    steps = config.diffusion_steps
    is_draft = plan < config.p_plan
    levels = (1 + (level * steps).int()).masked_fill(is_draft, steps)
    keys = keys + (1 + offsets.long()) * _TOKEN
    shown = alphas(config, tokens.device)[levels]
    hidden = levels == steps
    targets = (hidden | follows).int() * DIFFUSION
    if config.diffusion_type == "masked":
        drawn = uniform(keys, 1, stream=_LEVEL).squeeze(-1) >= shown
        targets = targets * drawn
        hidden = hidden | drawn
    targets = targets.masked_fill(is_draft, DRAFT)
    return Noise(levels, hidden | ~follows, targets, positions, keys)


def full_noise(tokens: Tensor, positions: Tensor | None, *, config: DARTConfig) -> Noise:
    """Every block hidden completely, as wherever the model is evaluated."""
    levels = torch.full_like(tokens, config.diffusion_steps, dtype=torch.int32)
    hidden = torch.ones_like(tokens, dtype=torch.bool)
    return Noise(levels, hidden, torch.full_like(levels, DRAFT), positions, tokens)


def _hide_context(places: Tensor, index: Tensor, keys: Tensor, config: DARTConfig) -> Tensor:
    """Positions that begin again at some blocks, before which nothing is visible."""
    begins = (places % config.block_size == 0) & (places > 0)
    begins &= uniform(keys, 1, stream=_CONTEXT).squeeze(-1) < config.p_uncond
    starts = torch.maximum(index - places, torch.where(begins, index, 0).cummax(dim=1).values)
    return (index - starts).int()
