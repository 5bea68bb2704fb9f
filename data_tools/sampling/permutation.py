"""Shuffled order of n items, computed in constant memory without set-up."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import numpy.typing as npt

from data_tools.arrays import IntArray

_UInt64Array = npt.NDArray[np.uint64]

_NUM_ROUNDS = 6  # four give a strong pseudorandom permutation; two more for very small domains
_WORD = (1 << 64) - 1
# The 64-bit finaliser of SplitMix (Steele, Lea, Flood 2014), variant 13 of Stafford.
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_GOLDEN_RATIO = 0x9E3779B97F4A7C15


class KeyedPermutation:
    """Bijection pi_key on [0, size): a Feistel network over Z_a x Z_b with cycle walking.

    With x = left * b + right, a = ceil(sqrt(size)) and b = ceil(size / a), the rounds alternate

        left  <- (left  + hash(right, round_key)) mod a
        right <- (right + hash(left,  round_key)) mod b

    Each is invertible, so their composition is a bijection of [0, a*b). The at most a - 1 values
    in [size, a*b) are mapped again until they fall inside, which gives a bijection on [0, size).
    Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002).

    Raises:
        ValueError: `size` is not in [1, 2**62].
    """

    def __init__(self, size: int, *, key: tuple[int | str, ...]) -> None:
        if not 1 <= size <= 1 << 62:
            raise ValueError(
                f"size={size} of a permutation must be between 1 and 2**62; pass the number of "
                "samples"
            )
        self.size = size
        self._left_size = math.isqrt(size - 1) + 1
        self._right_size = -(-size // self._left_size)
        self._round_keys = _round_keys(key)

    def __call__(self, indices: IntArray) -> IntArray:
        """Permute indices in [0, size) of any shape."""
        values = self._rounds(indices.astype(np.uint64))
        outside = values >= self.size
        while outside.any():
            values[outside] = self._rounds(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def permute_one(self, index: int) -> int:
        """Permute one Python integer: the readable oracle of the vectorised version."""
        value = index
        while True:
            left, right = divmod(value, self._right_size)
            for i in range(0, _NUM_ROUNDS, 2):
                left = (left + _hash_one(right, self._round_keys[i])) % self._left_size
                right = (right + _hash_one(left, self._round_keys[i + 1])) % self._right_size
            value = left * self._right_size + right
            if value < self.size:
                return value

    def _rounds(self, values: _UInt64Array) -> _UInt64Array:
        left_size, right_size = np.uint64(self._left_size), np.uint64(self._right_size)
        left, right = np.divmod(values, right_size)
        for i in range(0, _NUM_ROUNDS, 2):
            left = (left + _hash(right, self._round_keys[i]) % left_size) % left_size
            right = (right + _hash(left, self._round_keys[i + 1]) % right_size) % right_size
        return left * right_size + right


def _round_keys(key: tuple[int | str, ...]) -> list[int]:
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8 * _NUM_ROUNDS).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_NUM_ROUNDS)]


def _hash(values: _UInt64Array, round_key: int) -> _UInt64Array:
    mixed = values * np.uint64(_GOLDEN_RATIO) + np.uint64(round_key)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(_MULTIPLIER_1)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(_MULTIPLIER_2)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _hash_one(value: int, round_key: int) -> int:
    mixed = (value * _GOLDEN_RATIO + round_key) & _WORD
    mixed ^= mixed >> 30
    mixed = mixed * _MULTIPLIER_1 & _WORD
    mixed ^= mixed >> 27
    mixed = mixed * _MULTIPLIER_2 & _WORD
    return mixed ^ mixed >> 31
