"""Generation caches of the layers.

All state is a stream with one entry per token (or per memory slot), of which only the newest
entries are needed. A `History` keeps them: it appends in place, returns views, and can drop its
newest entries. A generation can thus be rolled back by up to `segment_len` tokens, to where a draft
of speculative decoding was rejected.

Shapes: b batch, g key/value heads, d head dimension, m slots, c segments, K slots retrieved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from models.common.cache import KVCache
from models.common.history import History, RollbackLimit


class Slots(NamedTuple):
    """Keys and values of memory slots: [b, g, m, d]."""

    keys: Tensor
    values: Tensor


class Retrieved(NamedTuple):
    """The slots that c segments read: keys and values [b, g, c, K + 1, d], and the logits that are
    added to the scores, fp32 [b, g, c, K + 1]. The last one is the empty slot: score 0, value 0."""

    keys: Tensor
    values: Tensor
    bias: Tensor

    def segments(self, start: int, stop: int) -> Retrieved:
        return Retrieved(*(cut(x, start, stop) for x in self))


def cut(x: Tensor, start: int, stop: int) -> Tensor:
    """x[:, :, start:stop]; x itself if that is all of it: even a full slice copies in backward."""
    return x if (start, stop) == (0, x.shape[2]) else x[:, :, start:stop]


class MemoryCache:
    """The memory path of one layer: the tokens of the open segment, and the slots of closed ones.

    `reaches`: entries to keep of each level of slots.
    """

    def __init__(
        self, segment_len: int, strides: tuple[int, ...], reaches: tuple[int, ...]
    ) -> None:
        self.segment_len = segment_len
        self.strides = strides
        # Two segments of tokens: the open one, and one that a rollback may reopen.
        self.tokens = tuple(History(2 * segment_len, dim=2) for _ in range(4))
        self.levels = tuple((History(n, dim=2), History(n, dim=2)) for n in reaches)
        self.summaries = History(3, dim=2)  # mean queries of closed segments
        self.retrieved: Retrieved | None = None
        self.retrieved_for = -1  # the segment that `retrieved` is for

    @property
    def length(self) -> int:
        return self.tokens[0].length

    def rollback(self, length: int) -> None:
        """Forget every token from `length` on, and the slots pooled from them."""
        num_closed = length // self.segment_len
        for history in self.tokens:
            history.rollback(length)
        for stride, level in zip(self.strides, self.levels, strict=True):
            for history in level:
                history.rollback(num_closed * (self.segment_len // stride))
        self.summaries.rollback(num_closed)
        if self.retrieved_for > num_closed:
            self.retrieved_for = -1

    def histories(self) -> Iterator[History]:
        yield from self.tokens
        for level in self.levels:
            yield from level
        yield self.summaries


class BlockCache:
    """The cache of one block; a member is None if the block has no such path or state."""

    def __init__(
        self,
        *,
        long: KVCache | None,
        local: tuple[History, History] | None,
        memory: MemoryCache | None,
        emotion: History | None,
        max_rollback: int,
        num_sinks: int = 0,
    ) -> None:
        self.length = 0
        self._limit = RollbackLimit(max_rollback, f"segment_len={max_rollback} tokens")
        self.long, self.local, self.memory, self.emotion = long, local, memory, emotion
        # Keys and values of sources that do not grow, by path; computed in the first call.
        self.static: dict[str, Slots] = {}
        self.num_sinks = num_sinks

    def rollback(self, length: int) -> None:
        """Forget every token from `length` on.

        Raises:
            ValueError: `length` is more than `max_rollback` tokens before the longest so far.
        """
        self._limit.check(self.length, length)
        if self.long is not None and self.long.length:
            self.long.rollback(self.num_sinks + length)
        for history in (*(self.local or ()), self.emotion):
            if history is not None:
                history.rollback(length)
        if self.memory is not None:
            self.memory.rollback(length)
        self.length = length

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors that are kept, reserved room included."""
        histories = [h for h in (*(self.local or ()), self.emotion) if h is not None]
        if self.memory is not None:
            histories += self.memory.histories()
        total = sum(history.num_bytes for history in histories)
        total += 0 if self.long is None else self.long.num_bytes
        return total + sum(x.nbytes for slots in self.static.values() for x in slots)


class EmbeddingCache:
    """The cache of the first layer: emotion state, and bank and modality of the first call."""

    def __init__(self, *, max_rollback: int) -> None:
        self.emotion = History(max_rollback + 1)
        self.bank: Tensor | None = None
        self.modality: Tensor | None = None
        self._limit = RollbackLimit(max_rollback, f"segment_len={max_rollback} tokens")
        self._given: frozenset[str] | None = None  # beside tokens, with the first of them

    def check_given(self, names: frozenset[str]) -> None:
        """Refuse inputs that were absent from the first call; those of the first may be repeated.

        Raises:
            ValueError: one of `names` was not given in the first call.
        """
        if self._given is None:
            self._given = names
        if late := sorted(names - self._given):
            raise ValueError(
                f"{', '.join(late)} came after the first tokens of a generation, which has begun "
                "without; give it with the first tokens, to a new cache"
            )

    def rollback(self, length: int) -> None:
        """Forget every token from `length` on, with the limit of `BlockCache.rollback`."""
        self._limit.check(self.emotion.length, length)
        self.emotion.rollback(length)
