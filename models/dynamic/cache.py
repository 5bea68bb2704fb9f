"""Generation caches of routed layers, which hold computed tokens only.

Shapes: b batch, r rows that take part in a call, m computed tokens of a row, c tokens of a call,
n query heads, g key and value heads, d head dimension.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.common.attention import QUERY_BLOCK, cached_attention, masked_attention
from models.common.cache import KeysValues, KVCache
from models.dynamic.token_gather import Selection, chosen_first

# Initial capacity relative to the expected fraction of tokens; it grows when exhausted.
FIRST_ROOM, LEAST_ROOM = 1.25, 64


class ComputedTokens(NamedTuple):
    """`rows`: int64 [r], rows with any; `selection` [r, m]: their tokens among the c of a call."""

    rows: Tensor
    selection: Selection


class CachedStep(NamedTuple):
    """The computed tokens of one call. `positions`: int32 [r, m], their positions in the sequence.

    `some`: which tokens they are; None if they are all tokens of all rows, of which as many have
    been computed before (one token of one row, as a rule).
    """

    positions: Tensor
    some: ComputedTokens | None


class RaggedKVCache:
    """Keys and values of the computed tokens, whose number differs per row: [b, g, room, d].

    `length` counts the tokens of the sequence, computed or not. Nothing is ever dropped: `room`
    doubles when a row needs more. The first tokens and keys determine dtype and device, as in
    `KVCache`. `share`: the expected fraction of computed tokens.
    """

    def __init__(self, batch_size: int, max_length: int, *, share: float) -> None:
        self.batch_size = batch_size
        self.max_length = max_length
        self.length = 0
        self._room = min(max_length, math.ceil(FIRST_ROOM * share * max_length) + LEAST_ROOM)
        self._stored: KeysValues | None = None
        self._chosen: Tensor | None = None
        self._numbers = [0] * batch_size  # the counts, where Python needs them

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole cache, filled or not; 0 before anything is stored."""
        return sum(x.nbytes for x in (*(self._stored or ()), self._chosen) if x is not None)

    @property
    def counts(self) -> Tensor:
        """Tokens kept of every row: int64 [b]."""
        if self._chosen is None:
            return torch.zeros(self.batch_size, dtype=torch.int64)
        return self._chosen[:, : self.length].sum(dim=1)

    def begin(self, chosen: Tensor) -> CachedStep | None:
        """Append c tokens, of which `chosen` bool [b, c] will be computed; None if none is.

        Raises:
            ValueError: the cache has no room left.
        """
        start, stop = self.length, self.length + chosen.shape[1]
        if stop > self.max_length:
            raise ValueError(
                f"cache of max_length={self.max_length} cannot hold {stop} positions; "
                "make it with a larger max_length"
            )
        if self._chosen is None:
            self._chosen = chosen.new_zeros(self.batch_size, self.max_length)
        self._chosen[:, start:stop] = chosen
        self.length = stop
        # .tolist() synchronises with the device, so that layers without chosen tokens are skipped.
        numbers = chosen.sum(dim=1).tolist()
        is_even = len(set(self._numbers)) == 1
        self._numbers = [sum(each) for each in zip(self._numbers, numbers, strict=True)]
        if not any(numbers):
            return None
        if is_even and min(numbers) == stop - start:
            positions = torch.arange(start, stop, dtype=torch.int32, device=chosen.device)
            return CachedStep(positions.expand(self.batch_size, -1), None)
        rows = torch.tensor([i for i, n in enumerate(numbers) if n], device=chosen.device)
        selection = chosen_first(chosen[rows], max(numbers))
        positions = (selection.indices + start).int()
        return CachedStep(positions, ComputedTokens(rows, selection))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, step: CachedStep) -> Tensor:
        """Store keys and values of a step and attend to those up to each query, its own included.

        q [r, n, m, d], k and v [r, g, m, d] -> [r, n, m, d].
        """
        if step.some is None:
            stop = self._numbers[0]
            stored = self._with_room(stop, k)
            for held, new in zip(stored, (k, v), strict=True):
                held[:, :, stop - k.shape[2] : stop] = new
            return cached_attention(q, *(held[:, :, :stop] for held in stored))
        rows, valid = step.some.rows, step.some.selection.valid
        assert valid is not None
        after = self.counts[rows]
        before = after - valid.sum(dim=1)
        total = int(after.max())
        stored = self._with_room(total, k)
        offsets = torch.arange(q.shape[2], device=q.device)
        slots = (before[:, None] + offsets)[valid]
        owners = rows[:, None].expand_as(valid)[valid]
        for held, new in zip(stored, (k, v), strict=True):
            held[owners, :, slots] = new.transpose(1, 2)[valid]
        keys, values = (self._rows(held, rows, total) for held in stored)
        if len(rows) == 1:
            return cached_attention(q, keys, values)
        # The last key of a query; filler tokens see all keys of the row.
        last = torch.minimum(before[:, None] + offsets, after[:, None] - 1)
        return _attend_up_to(q, keys, values, last)

    def rollback(self, length: int) -> None:
        """Forget every token from `length` on.

        Raises:
            ValueError: the cache is shorter than that.
        """
        if not 0 <= length <= self.length:
            raise ValueError(
                f"cannot roll a cache of length {self.length} back to {length}; give a length from "
                f"0 to {self.length}"
            )
        self.length = length
        self._numbers = self.counts.tolist()

    def _rows(self, x: Tensor, rows: Tensor, total: int) -> Tensor:
        return x[:, :, :total] if len(rows) == len(x) else x[rows, :, :total]

    def _with_room(self, total: int, like: Tensor) -> KeysValues:
        """Keys and values with room for `total` tokens; `like`: new keys [r, g, m, d]."""
        if self._stored is None:
            # Zeros: where rows differ in length, attention multiplies what is beyond a row by 0.
            shape = (self.batch_size, like.shape[1], self._room, like.shape[3])
            self._stored = KeysValues(like.new_zeros(shape), like.new_zeros(shape))
        room = self._stored.keys.shape[2]
        if total > room:
            more = min(self.max_length, max(2 * room, total)) - room
            self._stored = KeysValues(*(F.pad(x, (0, 0, 0, more)) for x in self._stored))
        return self._stored


def _attend_up_to(q: Tensor, k: Tensor, v: Tensor, last: Tensor) -> Tensor:
    """Attention of query j of row i over the keys 0 .. last[i, j], in blocks of queries."""
    index = torch.arange(k.shape[2], device=q.device)
    blocks = []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        part = slice(start, start + QUERY_BLOCK)
        mask = (index <= last[:, part, None]).unsqueeze(1)
        blocks.append(masked_attention(q[:, :, part], k, v, mask))
    return torch.cat(blocks, dim=2)


class PairCache:
    """Cache of a pair: keys and values of its decision layer and of its dynamic layer, and the
    surprise of every token for the moving average, fp32 or wider [b, max_length]."""

    def __init__(self, decision: KVCache, dynamic: RaggedKVCache) -> None:
        self.decision, self.dynamic = decision, dynamic
        self._surprise: Tensor | None = None

    @property
    def length(self) -> int:
        return self.decision.length

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that is kept, reserved room included."""
        surprise = 0 if self._surprise is None else self._surprise.nbytes
        return self.decision.num_bytes + self.dynamic.num_bytes + surprise

    def with_surprise(self, surprise: Tensor) -> Tensor:
        """Append the newest tokens' surprise [b, c] and return all so far [b, length]. The decision
        layer has counted these tokens already."""
        stop = self.decision.length
        if self._surprise is None:
            self._surprise = surprise.new_zeros(len(surprise), self.dynamic.max_length)
        self._surprise[:, stop - surprise.shape[1] : stop] = surprise
        return self._surprise[:, :stop]

    def rollback(self, length: int) -> None:
        """Forget every token from `length` on."""
        self.decision.rollback(length)
        self.dynamic.rollback(length)
