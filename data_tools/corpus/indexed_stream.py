"""Token stream over a .bin/.idx corpus."""

from __future__ import annotations

import numpy as np

from data_tools.arrays import IntArray, TokenArray
from data_tools.corpus.indexed import IndexedDataset
from data_tools.corpus.token_stream import Span


class IndexedStream:
    """The documents of a .bin/.idx corpus in order."""

    document_end = None

    def __init__(self, dataset: IndexedDataset, *, eod_id: int | None = None) -> None:
        """`eod_id`: the end-of-document id, if the corpus itself does not record one."""
        self.dataset = dataset
        self._eod_id = eod_id

    @property
    def num_tokens(self) -> int:
        return self.dataset.num_tokens

    @property
    def num_bytes(self) -> int | None:
        return None if self.dataset.info is None else self.dataset.info.num_bytes

    @property
    def eod_id(self) -> int | None:
        info = self.dataset.info
        return self._eod_id if info is None or info.eod_id is None else info.eod_id

    @property
    def bos_ids(self) -> tuple[int, ...]:
        return () if self.dataset.info is None else self.dataset.info.bos_ids

    @property
    def fingerprint(self) -> str:
        return self.dataset.fingerprint

    def read(self, starts: IntArray, length: int) -> TokenArray:
        tokens = self.dataset.tokens
        ids = np.empty((len(starts), length), dtype=tokens.dtype)
        # Faster than indexing a sliding_window_view, whose set-up costs as much as 40 rows.
        for row, start in zip(ids, starts.tolist(), strict=True):
            row[:] = tokens[start : start + length]
        return ids

    def document_starts(self, begins: IntArray, length: int) -> list[IntArray]:
        return self.dataset.document_starts(begins, length)

    def document_at(self, position: int) -> Span:
        return Span(*self.dataset.document_at(position))
