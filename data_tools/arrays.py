"""Array type aliases and binary search in memory-mapped arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
TokenArray = npt.NDArray[np.integer]  # in the dtype of the file

_READ_AT_ONCE = 1 << 14  # values


def bytes_of(values: npt.NDArray[Any]) -> memoryview:
    """Return the bytes of a contiguous array, without a copy."""
    return values.view(np.uint8).data


def bisect_right(values: npt.NDArray[Any], keys: IntArray) -> IntArray:
    """Compute `np.searchsorted(values, keys, side="right")` from log2(n) values per key, where
    there are many: numpy copies all of an unaligned array."""
    if len(values) <= _READ_AT_ONCE:
        return np.searchsorted(values, keys, side="right")
    low = np.zeros(len(keys), dtype=np.int64)
    high = np.full(len(keys), len(values), dtype=np.int64)
    while (active := low < high).any():
        middle = np.where(active, (low + high) // 2, 0)
        go_right = values[middle] <= keys
        low = np.where(active & go_right, middle + 1, low)
        high = np.where(active & ~go_right, middle, high)
    return low
