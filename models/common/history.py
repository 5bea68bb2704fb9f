"""Bounded history of a stream, for layer state kept between the calls of a generation."""

from __future__ import annotations

import torch
from torch import Tensor


class History:
    """The newest entries of a stream along dimension `dim`, at least `reach` of them.

    `length` counts all entries ever appended. The buffer has twice the required size, so that an
    append is one small copy, and entries move to the front only occasionally.
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
            ValueError: they have been dropped.
        """
        if count > self._stop:
            raise ValueError(
                f"count={count} is more than the {self._stop} of {self.length} entries that are "
                "kept; ask for fewer, or make the history with a larger reach"
            )
        assert self._buffer is not None
        return self._buffer.narrow(self.dim, self._stop - count, count)

    def extended(self, entries: Tensor, reach: int) -> Tensor:
        """Append entries and return them, preceded by up to `reach` earlier entries."""
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
            ValueError: earlier entries have already been dropped.
        """
        forgotten = self.length - length
        if forgotten < 0 or forgotten > self._stop:
            raise ValueError(
                f"cannot roll a history of {self.length} entries, of which {self._stop} are kept, "
                f"back to {length}; give a length from {self.length - self._stop} to {self.length}"
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


class RollbackLimit:
    """The rollback limit of a cache: `most` entries from its maximum length so far, in any number
    of steps; entries dropped for those cannot be restored. `name`: of the limit, in messages."""

    def __init__(self, most: int, name: str) -> None:
        self.most, self.name = most, name
        self._longest = 0

    def check(self, current: int, length: int) -> None:
        """Raise ValueError if a cache of length `current` cannot be rolled back to `length`."""
        self._longest = max(self._longest, current)
        if not max(0, self._longest - self.most) <= length <= current:
            raise ValueError(
                f"cannot roll a cache of length {current} back to {length}; at most {self.name} "
                f"can be taken back, and it has held {self._longest}"
            )
