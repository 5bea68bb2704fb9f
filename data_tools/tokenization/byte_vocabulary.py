"""Ids of raw bytes: the 256 values of a byte, and one that ends a document."""

from __future__ import annotations

BYTE_EOD = 256


BYTE_VOCAB_SIZE = 257  # 256 byte values and the end of a document; a model may have more
