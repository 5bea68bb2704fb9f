"""State that an attention layer keeps between the calls of a generation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeysValues(NamedTuple):
    """Keys and values of every position so far: [b, n_kv, length, d]."""

    keys: Tensor
    values: Tensor


class KVCache:
    """Keys and values of one layer in memory that is allocated once: [b, n_kv, max_length, d]."""

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch_size, num_kv_heads, max_length, head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def max_length(self) -> int:
        return self._keys.shape[2]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole cache, filled or not."""
        return self._keys.nbytes + self._values.nbytes

    def append(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Store [b, n_kv, s, d] after what is there and return everything up to it (views).

        Raises:
            ValueError: the cache has no room left.
        """
        stop = self.length + keys.shape[2]
        if stop > self.max_length:
            raise ValueError(
                f"cache of max_length={self.max_length} cannot hold {stop} positions; "
                "make it with a larger max_length"
            )
        self._keys[:, :, self.length : stop] = keys
        self._values[:, :, self.length : stop] = values
        self.length = stop
        return KeysValues(self._keys[:, :, :stop], self._values[:, :, :stop])

    def rollback(self, length: int) -> None:
        """Forget every position from `length` on.

        Raises:
            ValueError: the cache is shorter than that.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll a cache of length {self.length} back to {length}")
        self.length = length
