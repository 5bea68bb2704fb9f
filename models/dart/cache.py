"""Generation caches of the layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.common.cache import KeysValues, KVCache


class EmbeddingCache:
    """The number of tokens so far, and the modulation of level T."""

    def __init__(self) -> None:
        self.length = 0
        self.modulation: Tensor | None = None

    def rollback(self, length: int) -> None:
        self.length = length

    def prefix(self, length: int) -> EmbeddingCache:
        return EmbeddingCache()


class Prefix:
    """The first `length` entries of a cache, continued without a change to it."""

    def __init__(self, cache: KVCache, length: int) -> None:
        self.cache, self.length = cache, length

    def append(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Those entries and the new ones."""
        if self.length == 0:
            return KeysValues(keys, values)
        stored = (x[:, :, : self.length] for x in self.cache.stored())
        pairs = zip(stored, (keys, values), strict=True)
        return KeysValues(*(torch.cat(pair, dim=2) for pair in pairs))


class PairCache:
    """Keys and values of each repeat: causal stream, its clean context for blocks, plans."""

    def __init__(self, repeats: list[list[Any]]) -> None:
        self.repeats = repeats

    def prefix(self, length: int) -> PairCache:
        """The first `length` tokens, behind which a block can be denoised."""
        return PairCache([[Prefix(cache, length) for cache in caches] for caches in self.repeats])

    @property
    def length(self) -> int:
        return self.repeats[0][0].length

    def rollback(self, length: int) -> None:
        """Forget every token from `length` on."""
        for caches in self.repeats:
            for cache in caches:
                cache.rollback(length)


class HeadCache:
    """The stream whose logits a call of generation is for: the causal one, or the block that is
    denoised behind a prefix. Of a large vocabulary the others would be a large part of a pass."""

    def __init__(self, *, of_block: bool = False) -> None:
        self.of_block = of_block

    def rollback(self, length: int) -> None:
        """Nothing to forget."""

    def prefix(self, length: int) -> HeadCache:
        return HeadCache(of_block=True)
