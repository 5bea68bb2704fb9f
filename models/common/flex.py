"""FlexAttention over tiles of queries and keys, of which whole ones are skipped.

Shapes: s queries, b batch, n query heads, g key/value heads, d head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

# Queries and keys of a tile, which the kernel skips, or computes with or without the mask.
TILE = 128
# Of the kernels that it compiles.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEAST_HEAD_DIM = 16

# By the positions' identity, for as long as they exist and do not change: their version, and masks.
_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

Attend = Callable[..., Any]
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def has_kernel(q: Tensor) -> bool:
    """Whether FlexAttention compiles a kernel for q that is right: on CUDA, for heads of 16 and
    more. Without one it stores the scores of all pairs. On a CPU torch 2.13 compiles none with a
    gradient, and for heads of 16 wrong ones."""
    return (
        q.is_cuda
        and q.dtype in _DTYPES
        and q.shape[-1] >= _LEAST_HEAD_DIM
        # The program of an export has no kernel of one processor in it.
        and not torch.compiler.is_exporting()
    )


def kernel() -> Attend:
    """FlexAttention, compiled for every shape that it meets. More shapes than torch compiles are an
    error, since without a kernel it would go on with the scores of all pairs."""
    if torch.compiler.is_compiling():
        return flex_attention
    return _compiled()


@functools.cache
def _compiled() -> Attend:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    window: int | None = None,
    num_sinks: int = 0,
    attend: Attend | None = None,
) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` over the sinks and the tokens of the query's document up to it,
    with a `window` over the last ones of these: [b, n, s, d].

    q [b, n, s, d]; `positions` int32 [b, s] count from 0 in every document; k and v
    [b, g, num_sinks + s, d] with the sinks in front. Time grows with the pairs of tiles that see
    each other. `attend`: FlexAttention, compiled if None.
    """
    mask = _kept_mask(positions, window, num_sinks)
    attend = attend or kernel()
    mixed: Tensor = attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return mixed


def _kept_mask(positions: Tensor, window: int | None, num_sinks: int) -> BlockMask:
    """`span_mask`, made once for all layers that are given the same tensor: that is a hundred small
    operations."""
    if torch.compiler.is_compiling():
        return span_mask(positions, window, num_sinks)
    version, masks = _masks.get(positions, (None, {}))
    if version != positions._version:
        masks = {}
        _masks[positions] = positions._version, masks
    key = window, num_sinks
    if key not in masks:
        masks[key] = span_mask(positions, window, num_sinks)
    return masks[key]


def span_mask(positions: Tensor, window: int | None, num_sinks: int) -> BlockMask:
    """The tiles of pairs that `span_attention` computes; those that every query of a tile sees as a
    whole have no mask applied to them."""
    length, num_keys = positions.shape[1], positions.shape[1] + num_sinks
    reach = positions if window is None else positions.clamp(max=window - 1)
    first = torch.arange(length, dtype=reach.dtype, device=reach.device) - reach

    def is_seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        token = key - num_sinks
        return (token < 0) | ((token >= first[row, query]) & (token <= query))

    lowest, highest = ends(first, TILE)
    query = torch.arange(0, length, TILE, device=first.device).unsqueeze(-1)
    begin = torch.arange(-num_sinks, length, TILE, device=first.device)
    last = begin + TILE - 1
    seen = (begin < 0) | ((last >= lowest) & (begin < query + TILE))
    full = (last < 0) | ((begin >= highest) & (last <= query))
    sizes = (length, num_keys)
    return tiles_mask(seen & ~full, full, is_seen, size=TILE, seq_lengths=sizes)


def tiles_mask(
    masked: Tensor,
    full: Tensor,
    is_seen: MaskFunction,
    *,
    size: int,
    seq_lengths: tuple[int, int],
) -> BlockMask:
    """A mask of tiles, bool [b, queries / size, keys / size]: those to which `is_seen` is applied,
    and those that are seen as a whole. All others are skipped."""
    return BlockMask.from_kv_blocks(
        *_listed(masked),
        *_listed(full),
        BLOCK_SIZE=size,
        mask_mod=is_seen,
        seq_lengths=seq_lengths,
    )


def ends(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest of every tile of int [b, s]: [b, tiles, 1] each."""
    spare = -x.shape[1] % size
    tiles = F.pad(x[:, None].double(), (0, spare), mode="replicate")[:, 0].unflatten(1, (-1, size))
    least, greatest = tiles.aminmax(dim=-1)
    return least.long().unsqueeze(-1), greatest.long().unsqueeze(-1)


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Number and indices of the tiles of keys, bool [b, queries, keys], as FlexAttention's lists
    [b, 1, queries] and [b, 1, queries, keys] have them."""
    indices = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(dim=-1).int().unsqueeze(1), indices.int().unsqueeze(1)
