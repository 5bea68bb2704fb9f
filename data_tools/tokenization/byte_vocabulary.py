"""Vocabulary of raw bytes: the 256 byte values and an end-of-document id."""

from __future__ import annotations

BYTE_EOD = 256
BYTE_VOCAB_SIZE = 257  # 256 byte values and BYTE_EOD; a model may have a larger vocabulary
