"""Key-value cache of an attention layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class KeysValues(NamedTuple):
    """Keys and values of every position so far: [b, n_kv, length, d]."""

    keys: Tensor
    values: Tensor


class KVCache:
    """Preallocated keys and values of one layer: [b, n_kv, max_length, d].

    The first keys determine dtype and device. The weights cannot: they may be quantised, offloaded
    or those of a wrapper.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self._stored: KeysValues | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole cache, filled or not; 0 before anything is stored."""
        return 0 if self._stored is None else sum(x.nbytes for x in self._stored)

    def append(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Append [b, n_kv, s, d] and return all keys and values so far (views).

        Raises:
            ValueError: the cache has no room left.
        """
        stop = self.length + keys.shape[2]
        if stop > self.max_length:
            raise ValueError(
                f"cache of max_length={self.max_length} cannot hold {stop} positions; "
                "make it with a larger max_length"
            )
        if self._stored is None:
            batch, heads, _, size = keys.shape
            shape = (batch, heads, self.max_length, size)
            self._stored = KeysValues(keys.new_empty(shape), values.new_empty(shape))
        for stored, new in zip(self._stored, (keys, values), strict=True):
            stored[:, :, self.length : stop] = new
        self.length = stop
        return KeysValues(*(stored[:, :, :stop] for stored in self._stored))

    def stored(self) -> KeysValues:
        """All keys and values so far (views).

        Raises:
            ValueError: nothing has been appended.
        """
        if self._stored is None:
            raise ValueError("the cache is empty; append keys and values before reading them")
        return KeysValues(*(stored[:, :, : self.length] for stored in self._stored))

    def rollback(self, length: int) -> None:
        """Forget every position from `length` on.

        Raises:
            ValueError: the cache is shorter than that.
        """
        if not 0 <= length <= self.length:
            raise ValueError(
                f"cannot roll a cache of length {self.length} back to {length}; give a length from "
                f"0 to {self.length}"
            )
        self.length = length
