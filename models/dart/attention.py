"""Attention of the diffusion stream: its own block, and the causal stream before it.

Place i of a block that begins at place a sees

* the causal stream at places d ... a of its document, which begins at d: clean tokens up to a,
* the diffusion stream in its own block: in both directions where some tokens are shown, and up to
  place i where none is.

A block without tokens holds nothing but positions, so the second direction would add nothing; and
a plan does not depend on how much of its block exists, which makes prefixes, packed documents and
generation exact.

One softmax runs over both. No form of it makes a matrix over all pairs of places: whole rows are
merged from parts on CPU (models.dart.merged_attention) and are one FlexAttention on CUDA
(models.dart.flex), places behind a cache have a mask over chunks of queries.

Shapes: s places of a call, b batch, n query heads, g key/value heads, d head dimension, c and o
keys of the context and of the own stream.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.common.attention import QUERY_BLOCK, computed_again, masked_attention
from models.common.cache import KeysValues


class Blocks(NamedTuple):
    """Locations of the places of a call, counted in the row.

    `first`: the first place. `own_first`: that of the first own key. `starts`: int [1 or b, o],
    first place of every own key's block. `documents`: int [1 or b, o], the first visible place.
    `both_ways`: bool [b, o], whether a place sees later ones of its block. `size`: of a block.
    `is_aligned`: blocks begin at multiples of their size, and every place sees the row's first.
    """

    first: int
    own_first: int
    starts: Tensor
    documents: Tensor
    both_ways: Tensor
    size: int
    is_aligned: bool


class Reach(NamedTuple):
    """The keys that some queries may see, half open: `context` and `own`, counted as given."""

    context: tuple[int, int]
    own: tuple[int, int]


def find_blocks(
    both_ways: Tensor, positions: Tensor | None, *, size: int, first: int = 0, earlier: int = 0
) -> Blocks:
    """Blocks of places first ... first + s - 1; `both_ways` bool [b, s] says which way they see.

    `positions`: int32 [b, s] of packed rows. `earlier`: places of the same stream before the first
    one whose keys are given, too.
    """
    begin = first - earlier
    index = torch.arange(begin, first + both_ways.shape[1], device=both_ways.device).unsqueeze(0)
    places = index if positions is None else positions
    both_ways = F.pad(both_ways, (earlier, 0))
    starts = index - places % size
    return Blocks(first, begin, starts, index - places, both_ways, size, positions is None)


def reach(blocks: Blocks, start: int, stop: int) -> Reach:
    """The keys that own places start ... stop - 1 may see, whatever the text."""
    begin, size, num_own = blocks.own_first, blocks.size, blocks.starts.shape[1]
    if blocks.is_aligned:
        lowest = (begin + start) // size * size
        highest = (begin + stop - 1) // size * size
        near = max(0, lowest - begin), min(num_own, highest + size - begin)
        return Reach((0, highest + 1), near)
    return Reach((0, begin + stop), (max(0, start - size + 1), min(num_own, stop + size - 1)))


def context_mask(blocks: Blocks, start: int, stop: int, keys: tuple[int, int]) -> Tensor:
    """Mask of the context keys that own places start ... stop - 1 see: bool
    [1 or b, stop - start, keys]."""
    index = torch.arange(*keys, device=blocks.starts.device)
    documents, starts = (x[:, start:stop].unsqueeze(-1) for x in (blocks.documents, blocks.starts))
    return (index <= starts) & (index >= documents)


def own_mask(blocks: Blocks, start: int, stop: int, keys: tuple[int, int]) -> Tensor:
    """Mask of the own keys that own places start ... stop - 1 see: bool [b, stop - start, keys]."""
    queries = torch.arange(start, stop, device=blocks.starts.device).unsqueeze(-1)
    index = torch.arange(*keys, device=blocks.starts.device)
    inside = blocks.starts[:, slice(*keys)].unsqueeze(1) == blocks.starts[:, start:stop, None]
    return inside & (blocks.both_ways[:, start:stop, None] | (index <= queries))


def masked_block_attention(
    q: Tensor, context: KeysValues, own: KeysValues, blocks: Blocks
) -> Tensor:
    """Mix the values that the last s own places see: q [b, n, s, d] -> [b, n, s, d].

    `context`: the causal stream from place 0 on, [b, g, c, d]. `own`: the diffusion stream from
    place `blocks.own_first` on, [b, g, o, d]. Chunks of queries have a mask over the keys that they
    may see, and are computed again in backward.
    """
    length, earlier = q.shape[2], own.keys.shape[2] - q.shape[2]
    chunks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        places = start + earlier, stop + earlier
        seen, near = reach(blocks, *places)
        clean, inside = context_mask(blocks, *places, seen), own_mask(blocks, *places, near)
        rows = max(clean.shape[0], inside.shape[0])
        mask = torch.cat((clean.expand(rows, -1, -1), inside.expand(rows, -1, -1)), dim=-1)
        pairs = zip(context, own, strict=True)
        keys, values = (
            torch.cat((x[:, :, slice(*seen)], z[:, :, slice(*near)]), dim=2) for x, z in pairs
        )
        chunks.append(
            computed_again(masked_attention, q[:, :, start:stop], keys, values, mask.unsqueeze(1))
        )
    return torch.cat(chunks, dim=2) if len(chunks) > 1 else chunks[0]
