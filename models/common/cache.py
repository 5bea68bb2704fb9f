"""Key-value cache of an attention layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
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

    def fixed(self, position: Tensor) -> FixedKVCache:
        """This cache for steps of one token that are one compiled program, in the same storage.

        `position` int64 [1]: the number of positions so far, on the device. The caller counts it
        on, and all layers share it.

        Raises:
            ValueError: nothing has been appended.
        """
        if self._stored is None:
            raise ValueError("the cache is empty; append keys and values before it is fixed")
        for stored in self._stored:
            stored[:, :, self.length :] = 0  # hidden values are multiplied by 0, and may not be nan
        return FixedKVCache(*self._stored, position)


class FixedKVCache(NamedTuple):
    """Keys and values in calls of one token that all have the same shapes and addresses.

    `keys`, `values` [b, n_kv, max_length, d]: a call reads them all, and `visible` says which
    positions exist. `position` int64 [1]: the number of positions before the call.
    """

    keys: Tensor
    values: Tensor
    position: Tensor

    @property
    def positions(self) -> Tensor:
        """The position of the new token, the same in every row: int64 [1, 1]."""
        return self.position.unsqueeze(0)

    def append(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Write [b, n_kv, 1, d] at the position and return the keys and values of all positions,
        [b, n_kv, max_length, d]."""
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        return KeysValues(self.keys, self.values)

    def visible(self, window: int | None) -> Tensor:
        """Mask of the positions that the new token sees, its own included: bool [1, max_length]."""
        index = torch.arange(self.keys.shape[2], device=self.position.device)
        seen = index <= self.position
        if window is not None:
            seen = seen & (index > self.position - window)
        return seen.unsqueeze(0)
