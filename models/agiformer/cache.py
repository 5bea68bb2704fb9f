"""Generation caches: constant in size, whatever the length of the text.

Every part of a cache can take back up to `MAX_ROLLBACK` bytes, as speculative decoding needs.

Shapes: b batch, n heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.agiformer.memory.forms import MemoryInputs, Remembered
from models.common.history import History, RollbackLimit

MAX_ROLLBACK = 64


class ByteCounter:
    """The bytes that a layer has seen, and how far they may be taken back."""

    def __init__(self) -> None:
        self.length = 0
        self._limit = RollbackLimit(MAX_ROLLBACK, f"{MAX_ROLLBACK} bytes")

    def advance(self, count: int) -> None:
        self.length += count

    def rollback(self, length: int) -> None:
        """Raises ValueError: more than MAX_ROLLBACK bytes before the most that it has seen."""
        self._limit.check(self.length, length)
        self.length = length


class MemoryCache:
    """The state of a Hebbian memory, and what takes it back.

    A decayed state cannot be undone. So an older state is kept beside the newest one, with the
    keys, values and decays since: a rollback repeats some of them.
    """

    def __init__(self, reach: int, remember: Callable[..., Remembered]) -> None:
        self.reach, self.remember = reach, remember  # in patches
        self.state: Tensor | None = None
        self._older: Tensor | None = None
        self._since: MemoryInputs | None = None
        self.length = 0

    def read(self, inputs: MemoryInputs) -> Tensor:
        """Add patches and return what they read: [b, n, s, E + 1]."""
        values, self.state = self.remember(inputs, self.state)
        self.length += inputs.q.shape[2]
        self._since = inputs if self._since is None else _joined(self._since, inputs)
        excess = self._since.q.shape[2] - self.reach
        if excess > self.reach:  # seldom, so that a step is cheap
            self._older = self.remember(_cut(self._since, 0, excess), self._older).state
            self._since = _cut(self._since, excess, excess + self.reach)
        return values

    def rollback(self, length: int) -> None:
        """Forget every patch from number `length` on."""
        forgotten = self.length - length
        if forgotten == 0 or self._since is None:
            return
        kept = self._since.q.shape[2] - forgotten
        self._since = _cut(self._since, 0, kept) if kept else None
        self.state = self._older
        if self._since is not None:
            self.state = self.remember(self._since, self._older).state
        self.length = length

    @property
    def num_bytes(self) -> int:
        kept = [self.state, self._older, *(self._since or ())]
        return sum(x.nbytes for x in kept if x is not None)


class BlockCache:
    """The cache of a block: keys and values of the window, and the memory."""

    def __init__(self, *, patch_size: int, window: int, memory: MemoryCache | None) -> None:
        self.patch_size, self.memory = patch_size, memory
        self.local = tuple(History(window - 1 + rollback_patches(patch_size), dim=2) for _ in "kv")
        self.length = 0  # in patches

    def rollback(self, length: int) -> None:
        """Forget every byte from number `length` on. The encoder's cache checks how far."""
        self.length = -(-length // self.patch_size)
        for history in self.local:
            history.rollback(self.length)
        if self.memory is not None:
            self.memory.rollback(self.length)

    @property
    def num_bytes(self) -> int:
        own = sum(history.num_bytes for history in self.local)
        return own + (0 if self.memory is None else self.memory.num_bytes)


class EncoderCache:
    """The cache of the encoder: the bytes before the next patch. int64 [b, bytes]."""

    def __init__(self, reach: int) -> None:
        self.bytes = History(reach + MAX_ROLLBACK, dim=1)
        self.counter = ByteCounter()

    def rollback(self, length: int) -> None:
        self.counter.rollback(length)
        self.bytes.rollback(length)


class HeadCache:
    """The cache of the head: the bytes of the open patch, and the projection of its latent."""

    def __init__(self, patch_size: int) -> None:
        self.patch_size = patch_size
        self.bytes = History(patch_size + MAX_ROLLBACK, dim=1)
        self.projected = History(1 + rollback_patches(patch_size))
        self.counter = ByteCounter()

    def rollback(self, length: int) -> None:
        self.counter.rollback(length)
        self.bytes.rollback(length)
        self.projected.rollback(-(-length // self.patch_size))


class ReasoningCache:
    """Nothing is kept; where there is one, the block stops early."""

    def rollback(self, length: int) -> None:
        """Nothing to forget."""


def rollback_patches(patch_size: int) -> int:
    """Patches that MAX_ROLLBACK bytes may take back."""
    return MAX_ROLLBACK // patch_size + 1


def _joined(first: MemoryInputs, second: MemoryInputs) -> MemoryInputs:
    pairs = zip(first[:4], second[:4], strict=True)
    return MemoryInputs(*(torch.cat(pair, dim=2) for pair in pairs))


def _cut(inputs: MemoryInputs, start: int, stop: int) -> MemoryInputs:
    return MemoryInputs(*(x[:, :, start:stop].clone() for x in inputs[:4]))
