"""Attention of whole rows as one FlexAttention, over the context's keys and then the own ones.

Shapes: s places, b batch, n query heads, g key/value heads, d head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from models.common.cache import KeysValues
from models.common.flex import TILE, Attend, MaskFunction, ends, kernel, tiles_mask
from models.dart.attention import Blocks


def flex_block_attention(
    q: Tensor,
    context: KeysValues,
    own: KeysValues,
    blocks: Blocks,
    *,
    attend: Attend | None = None,
) -> Tensor:
    """Mix the values that every place of whole rows sees: q [b, n, s, d] -> [b, n, s, d].

    `context` and `own`: [b, g, s, d] each. `attend`: FlexAttention, by default compiled, without
    which it stores the scores of all pairs.
    """
    keys, values = (torch.cat(pair, dim=2) for pair in zip(context, own, strict=True))
    mask, grouped = tile_mask(blocks, len(q)), q.shape[1] != keys.shape[1]
    attend = attend or kernel()
    mixed: Tensor = attend(q, keys, values, block_mask=mask, enable_gqa=grouped)
    return mixed


def mask_function(blocks: Blocks) -> MaskFunction:
    """Whether query i of row b sees key j; keys s ... 2 s - 1 are the own ones."""
    batch, length = blocks.both_ways.shape
    starts, documents = (
        x.expand(batch, -1).contiguous() for x in (blocks.starts, blocks.documents)
    )
    both_ways = blocks.both_ways

    def is_seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        start = starts[row, query]
        clean = (key < length) & (key <= start) & (key >= documents[row, query])
        own = (key - length).clamp(min=0)  # an index, also where the key is of the context
        inside = (key >= length) & (starts[row, own] == start)
        return clean | (inside & (both_ways[row, query] | (own <= query)))

    return is_seen


def tile_mask(blocks: Blocks, batch: int) -> BlockMask:
    """The tiles of pairs that something in them sees, from the first and last start of a block and
    of a document among a tile's queries: no matrix over pairs of places.

    Tiles of the context that every query sees as a whole have no mask applied to them.
    """
    length = blocks.starts.shape[1]
    lowest, highest = ends(blocks.starts.expand(batch, -1), TILE)
    begin, latest_begin = ends(blocks.documents.expand(batch, -1), TILE)
    first = torch.arange(0, 2 * length, TILE, device=lowest.device)
    last = (first + TILE).clamp(max=2 * length)
    context = (first <= highest) & (last > begin) & (first < length)
    last_own = (highest + blocks.size).clamp(max=length) + length
    own = (first < last_own) & (last > lowest + length)
    full = (first >= latest_begin) & (last - 1 <= lowest)
    return tiles_mask(
        (context | own) & ~full,
        full,
        mask_function(blocks),
        size=TILE,
        seq_lengths=(length, 2 * length),
    )
