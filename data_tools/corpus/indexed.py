"""Memory-mapped token sequences in Megatron's .bin/.idx format.

PREFIX.bin holds only the tokens. PREFIX.idx, little-endian without padding:

    9 bytes  magic "MMIDIDX\\0\\0"
    u64      version, 1
    u8       dtype code (DTYPES)
    u64 u64  number of sequences n; number of document bounds m (documents + 1)
    i32[n]   sequence lengths in tokens
    i64[n]   sequence offsets in bytes
    i64[m]   document bounds: document d is the sequences [bounds[d], bounds[d+1])
    i8[n]    modes, only in multimodal files; not read here

The arrays start at byte 34 and are not aligned: NumPy copies a whole unaligned array before
`searchsorted`, `take` or a reduction. `arrays.bisect_right` reads log2(n) of many elements instead.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.arrays import IntArray, TokenArray, bisect_right
from data_tools.corpus.corpus_info import read_info
from data_tools.corpus.token_stream import DocumentOrigin, Span
from data_tools.errors import DataError
from data_tools.files import map_file

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, str] = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float64",
    7: "float32",
    8: "uint16",
}
TOKEN_DTYPES = ("uint8", "uint16", "int32", "int64")
_PROBES = 1024  # index entries checked when a corpus is opened
_CHUNK_DOCUMENTS = 1 << 16
_FINGERPRINT_BLOCKS = 64
_FINGERPRINT_BLOCK_SIZE = 4096  # bytes


class IndexPaths(NamedTuple):
    """Paths of the two files of a corpus."""

    bin: Path
    idx: Path

    @classmethod
    def of(cls, prefix: Path) -> IndexPaths:
        return cls(
            bin=prefix.with_name(prefix.name + ".bin"), idx=prefix.with_name(prefix.name + ".idx")
        )


class Chunk(NamedTuple):
    """Consecutive documents with concatenated ids."""

    first_document: int
    ids: npt.NDArray[Any]
    lengths: IntArray


class IndexedDataset:
    """Documents of tokens in PREFIX.bin and PREFIX.idx, opened in constant time and memory.

    `tokens` is the whole corpus as one flat array of the file's dtype; `lengths`, `offsets` and
    `document_bounds` are the arrays of the index. All are views of the mapped files.

    Raises:
        DataError: a file is missing, empty, truncated or of another format, or the two disagree.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = Path(prefix)
        self.paths = IndexPaths.of(self.prefix)
        index = map_file(self.paths.idx)
        self.dtype, num_sequences, num_bounds = self._read_header(index)
        self._check_index_size(len(index), num_sequences, num_bounds)
        end_of_lengths = HEADER.size + 4 * num_sequences
        end_of_offsets = end_of_lengths + 8 * num_sequences
        self.lengths = _view(index, "<i4", num_sequences, HEADER.size)
        self.offsets = _view(index, "<i8", num_sequences, end_of_lengths)
        self.document_bounds = _view(index, "<i8", num_bounds, end_of_offsets)
        data = map_file(self.paths.bin)
        self._check_consistency(len(data))
        self.tokens = np.frombuffer(data, dtype=self.dtype)
        self.info = read_info(self.prefix)
        self._check_sidecar()

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        return len(self.document_bounds) - 1

    def document(self, index: int) -> npt.NDArray[Any]:
        """Return the tokens of one document."""
        begin, end = self._document_span(index)
        return self.tokens[begin:end]

    def token_offset(self, sequence: int) -> int:
        """Return the index in `tokens` of the start of a sequence."""
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self.offsets[sequence]) // self.dtype.itemsize

    def document_starts(self, begins: IntArray, length: int) -> list[IntArray]:
        """Return, for each begin, the document starts p with begin < p < begin + length."""
        itemsize = self.dtype.itemsize
        span_ends = np.stack([begins, begins + length - 1])
        sequences = bisect_right(self.offsets, span_ends.reshape(-1) * itemsize)
        firsts, lasts = bisect_right(self.document_bounds, sequences - 1).reshape(2, -1).tolist()
        return [
            self.offsets[self.document_bounds[first:last]] // itemsize
            for first, last in zip(firsts, lasts, strict=True)
        ]

    def document_at(self, position: int) -> tuple[int, int]:
        """Return begin and end of the document around a token."""
        return self._document_span(self.document_index(position))

    def document_index(self, position: int) -> int:
        """Return the number of the document around a token."""
        sequence = bisect_right(self.offsets, np.array([position * self.dtype.itemsize])) - 1
        return int(bisect_right(self.document_bounds, sequence)[0]) - 1

    def document_ends(self, begin: int, end: int) -> IntArray:
        """Return the ends in `tokens` of documents [begin, end)."""
        sequences = np.asarray(self.document_bounds[begin + 1 : end + 1])
        is_last = sequences == self.num_sequences
        starts = np.asarray(self.offsets[np.where(is_last, 0, sequences)]) // self.dtype.itemsize
        return np.where(is_last, self.num_tokens, starts)

    def chunks(self, *, num_tokens: int = 1 << 22) -> Iterator[Chunk]:
        """Iterate over all documents in order, in chunks of `num_tokens` or one longer document."""
        first = begin = 0
        while first < self.num_documents:
            ends = self.document_ends(first, min(first + _CHUNK_DOCUMENTS, self.num_documents))
            count = max(1, int(np.searchsorted(ends, begin + num_tokens, side="right")))
            lengths = np.diff(ends[:count], prepend=begin)
            end = int(ends[count - 1])
            yield Chunk(first, self.tokens[begin:end], lengths)
            first, begin = first + count, end

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of sizes, dtype and 64 blocks spread over .bin, in constant time.

        It distinguishes corpora; use `python -m data_tools.verify` to detect damage.
        """
        shape = (self.dtype.name, self.num_tokens, self.num_sequences, self.num_documents)
        digest = hashlib.sha256(repr(shape).encode())
        data = self.tokens.view(np.uint8)
        starts = np.linspace(0, max(0, len(data) - _FINGERPRINT_BLOCK_SIZE), _FINGERPRINT_BLOCKS)
        for start in starts.astype(np.int64):
            digest.update(data[start : start + _FINGERPRINT_BLOCK_SIZE].tobytes())
        return digest.hexdigest()

    def _document_span(self, index: int) -> tuple[int, int]:
        begin, end = (int(self.document_bounds[index + i]) for i in (0, 1))
        return self.token_offset(begin), self.token_offset(end)

    def _read_header(self, index: mmap.mmap) -> tuple[np.dtype[Any], int, int]:
        path = self.paths.idx
        if len(index) < HEADER.size:
            raise DataError(
                f"{path}: {len(index)} bytes found, at least {HEADER.size} expected; it is "
                "truncated: preprocess the corpus again"
            )
        magic, version, code, num_sequences, num_bounds = HEADER.unpack_from(index)
        if magic != MAGIC:
            raise DataError(
                f"{path}: magic {magic!r} found, {MAGIC!r} expected; it is not a Megatron index: "
                "create one with python -m data_tools.preprocess"
            )
        if version != VERSION:
            raise DataError(
                f"{path}: version {version} found, {VERSION} expected; preprocess the corpus again"
            )
        name = DTYPES.get(code)
        if name not in TOKEN_DTYPES:
            raise DataError(
                f"{path}: dtype code {code} ({name or 'unknown'}) found, one of "
                f"{', '.join(TOKEN_DTYPES)} expected; preprocess the corpus again"
            )
        return np.dtype(name).newbyteorder("<"), num_sequences, num_bounds

    def _check_index_size(self, found: int, num_sequences: int, num_bounds: int) -> None:
        path = self.paths.idx
        if num_sequences == 0 or num_bounds < 2:
            raise DataError(f"{path}: it lists no documents; preprocess a corpus that holds text")
        expected = HEADER.size + 12 * num_sequences + 8 * num_bounds
        if found not in (expected, expected + num_sequences):
            raise DataError(
                f"{path}: {found} bytes found, {expected} expected for {num_sequences} sequences "
                f"and {num_bounds - 1} documents; it is damaged: preprocess the corpus again"
            )

    def _check_consistency(self, bin_size: int) -> None:
        itemsize = self.dtype.itemsize
        expected = int(self.offsets[-1]) + int(self.lengths[-1]) * itemsize
        if bin_size != expected:
            raise DataError(
                f"{self.paths.bin}: {bin_size} bytes found, {expected} expected by "
                f"{self.paths.idx.name}; it is truncated or another corpus's: preprocess it again"
            )
        bounds = self.document_bounds
        if bounds[0] != 0 or bounds[-1] != self.num_sequences:
            raise self._damaged("the document bounds do not cover the sequences")
        num_joints = self.num_sequences - 1
        probes = np.linspace(0, num_joints, min(_PROBES, num_joints), endpoint=False, dtype=int)
        ends = self.offsets[probes] + self.lengths[probes] * np.int64(itemsize)
        if self.offsets[0] != 0 or not np.array_equal(self.offsets[probes + 1], ends):
            raise self._damaged("an offset is not the end of the previous sequence")

    def _check_sidecar(self) -> None:
        if self.info is None:
            return
        found = (self.num_tokens, self.num_documents, self.dtype.name)
        expected = (self.info.num_tokens, self.info.num_documents, self.info.dtype)
        if found != expected:
            raise DataError(
                f"{self.prefix}.json: tokens, documents and dtype {expected} expected, {found} "
                "found in .bin/.idx; it belongs to another corpus: preprocess the corpus again"
            )

    def _damaged(self, problem: str) -> DataError:
        return DataError(f"{self.paths.idx}: {problem}; it is damaged: preprocess the corpus again")


def _view(buffer: mmap.mmap, dtype: str, count: int, offset: int) -> npt.NDArray[Any]:
    return np.frombuffer(buffer, dtype=dtype, count=count, offset=offset)


class IndexedStream:
    """The documents of a .bin/.idx corpus in order."""

    document_end = None
    is_bytes = False

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

    def origin_at(self, position: int) -> DocumentOrigin:
        index = self.dataset.document_index(position)
        info = self.dataset.info
        sources = () if info is None else info.sources
        # Documents keep the order of the inputs; in a corpus made otherwise the counts differ.
        if sum(source.num_documents for source in sources) == self.dataset.num_documents:
            first = 0
            for source in sources:
                if index < first + source.num_documents:
                    return DocumentOrigin(index, source.name, input_index=index - first)
                first += source.num_documents
        return DocumentOrigin(index)
