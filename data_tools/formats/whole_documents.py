"""Groups of whole documents, for formats that write records and not a stream of ids."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data_tools.arrays import IntArray, TokenArray
from data_tools.errors import DataError
from data_tools.formats.blocks import Block

MAX_BYTES = 1 << 30  # of a document: Arrow counts in int32, MDS and litdata in uint32
Write = Callable[[list[TokenArray], IntArray], None]
"""Takes the ids of documents, in parts that may end within one, and the lengths of documents."""


def joined(parts: list[TokenArray]) -> TokenArray:
    """Return the parts as one array, without a copy if there is one part."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class WholeDocuments:
    """Collects blocks and hands on groups of documents; holds one group and one document."""

    def __init__(self, write: Write, *, group_bytes: int, document_bytes: int = MAX_BYTES) -> None:
        """`document_bytes`: the largest document that the format can hold."""
        self._write = write
        self._group_bytes = group_bytes
        self._document_bytes = document_bytes
        self._parts: list[TokenArray] = []
        self._lengths: list[IntArray] = []
        self._open = self._held = self._num_documents = 0

    def add(self, block: Block) -> None:
        """Collect a block, and hand on a group if it is large enough.

        Raises:
            DataError: a document is larger than the format can hold.
        """
        ids, ends = block.ids, block.ends
        lengths = np.diff(ends, prepend=-self._open)
        rest = len(ids) - int(ends[-1]) if len(ends) else self._open + len(ids)
        longest = max(int(lengths.max(initial=0)), rest)
        if longest * ids.itemsize > self._document_bytes:
            index = int(np.argmax(lengths)) if rest < longest else len(lengths)
            raise DataError(
                f"{block.path}: document {self._num_documents + index} has {longest} tokens or "
                f"more, at most {self._document_bytes // ids.itemsize} fit in a record of the "
                "output; choose another --to, or split it"
            )
        self._lengths.append(lengths)
        self._num_documents += len(lengths)
        if self._held + ids.nbytes < self._group_bytes or len(ends) == 0:
            self._parts.append(ids)
            self._held += ids.nbytes
            self._open = rest
            return
        last = int(ends[-1])
        self._parts.append(ids[:last])
        self.flush()
        self._parts, self._held, self._open = [ids[last:]], rest * ids.itemsize, rest

    def flush(self) -> None:
        """Hand on the documents that are held; none may be incomplete."""
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int64)
        if len(lengths):
            self._write([part for part in self._parts if len(part)], lengths)
        self._parts, self._lengths, self._held, self._open = [], [], 0, 0
