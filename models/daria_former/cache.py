"""What the layers keep between the calls of a generation.

Everything is a stream with one entry per token (or per memory slot) of which the last entries are
needed, so everything is a `History`: it appends in place, gives views, and can forget its newest
entries again. So a generation can be rolled back, by up to `segment_len` tokens, to where a
speculative decoder's draft was refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.common.cache import KVCache

if TYPE_CHECKING:
    from models.daria_former.memory import Retrieved, Slots


class History:
    """The newest entries of a stream along dimension `dim`, at least `reach` of them.

    `length` counts all entries ever appended. The buffer holds twice what has to be kept, so that
    an append is one small copy, and once in a while the kept part moves to the front.
    """

    def __init__(self, reach: int, *, dim: int = 0) -> None:
        self.reach = reach
        self.dim = dim
        self.length = 0
        self._buffer: Tensor | None = None
        self._stop = 0  # entries in the buffer

    @property
    def kept(self) -> int:
        return self._stop

    def append(self, entries: Tensor) -> None:
        """Add entries after the newest one."""
        count = entries.shape[self.dim]
        self.length += count
        if count > self.reach:  # nothing older is needed
            entries = entries.narrow(self.dim, count - self.reach, self.reach)
            count, self._stop = self.reach, 0
        buffer = self._room_for(count, entries)
        buffer.narrow(self.dim, self._stop, count).copy_(entries)
        self._stop += count

    def last(self, count: int) -> Tensor:
        """The newest `count` entries, in their order (a view, valid until the next append).

        Raises:
            ValueError: they are not kept any more.
        """
        if count > self._stop:
            raise ValueError(f"{count} entries asked for, {self._stop} of {self.length} are kept")
        assert self._buffer is not None
        return self._buffer.narrow(self.dim, self._stop - count, count)

    def extended(self, entries: Tensor, reach: int) -> Tensor:
        """Append entries and return them after the `reach` (or fewer) entries before them."""
        before = min(reach, self._stop)
        if entries.shape[self.dim] + before <= self.reach:
            self.append(entries)
            return self.last(entries.shape[self.dim] + before)
        parts = (self.last(before), entries) if before else (entries,)
        joined = torch.cat(parts, dim=self.dim)
        self.append(entries)
        return joined

    def rollback(self, length: int) -> None:
        """Forget every entry from number `length` on.

        Raises:
            ValueError: entries before it have already been dropped.
        """
        forgotten = self.length - length
        if forgotten < 0 or forgotten > self._stop:
            raise ValueError(
                f"cannot roll a history of {self.length} entries, of which {self._stop} are kept, "
                f"back to {length}"
            )
        self._stop -= forgotten
        self.length = length

    def _room_for(self, count: int, like: Tensor) -> Tensor:
        if self._buffer is None:
            shape = list(like.shape)
            shape[self.dim] = 2 * self.reach
            self._buffer = like.new_empty(shape)
        if self._stop + count > 2 * self.reach:
            kept = min(self._stop, self.reach)
            newest = self.last(kept).clone()
            self._buffer.narrow(self.dim, 0, kept).copy_(newest)
            self._stop = kept
        return self._buffer

    @property
    def num_bytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.nbytes


class MemoryCache:
    """The memory path of one layer: the tokens of the open segment, and the slots of closed ones.

    `reaches`: entries to keep of each level of slots.
    """

    def __init__(
        self, segment_len: int, strides: tuple[int, ...], reaches: tuple[int, ...]
    ) -> None:
        self.segment_len = segment_len
        self.strides = strides
        # Two segments of tokens: the open one, and one more that a rollback may open again.
        self.tokens = tuple(History(2 * segment_len, dim=2) for _ in range(4))
        self.levels = tuple((History(n, dim=2), History(n, dim=2)) for n in reaches)
        self.summaries = History(3, dim=2)  # mean queries of closed segments
        self.retrieved: Retrieved | None = None
        self.retrieved_for = -1  # the segment that `retrieved` is for

    @property
    def length(self) -> int:
        return self.tokens[0].length

    def rollback(self, length: int) -> None:
        """Forget every token from `length` on, and what was pooled from them."""
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


class _RollbackLimit:
    """How far back a cache may be taken: `max_rollback` tokens from the most that it has ever held,
    in however many steps. What has been dropped for those tokens does not come back."""

    def __init__(self, max_rollback: int) -> None:
        self.max_rollback = max_rollback
        self._most = 0

    def check(self, current: int, length: int) -> None:
        """Raises ValueError where a cache of `current` tokens cannot be taken back to `length`."""
        self._most = max(self._most, current)
        if not max(0, self._most - self.max_rollback) <= length <= current:
            raise ValueError(
                f"cannot roll a cache of length {current} back to {length}; at most segment_len="
                f"{self.max_rollback} tokens can be taken back, and it has held {self._most}"
            )


class BlockCache:
    """Everything one block keeps: a member is None where the block has no such path or state."""

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
        self._limit = _RollbackLimit(max_rollback)
        self.long, self.local, self.memory, self.emotion = long, local, memory, emotion
        # Keys and values of what does not grow, by path; made by the first call.
        self.static: dict[str, Slots] = {}
        self.num_sinks = num_sinks

    def rollback(self, length: int) -> None:
        """Forget every token from `length` on.

        Raises:
            ValueError: that is more than `max_rollback` tokens before the most that it has held.
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
    """What the first layer keeps: emotion state, and bank and modality of the first call."""

    def __init__(self, *, max_rollback: int) -> None:
        self.emotion = History(max_rollback + 1)
        self.bank: Tensor | None = None
        self.modality: Tensor | None = None
        self._limit = _RollbackLimit(max_rollback)
        self._given: frozenset[str] | None = None  # beside tokens, with the first of them

    def check_given(self, names: frozenset[str]) -> None:
        """Refuse inputs that a generation began without; those of its first call may come again.

        Raises:
            ValueError: `names` has one that was not there in the first call.
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
