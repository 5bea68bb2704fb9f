"""Token stream over raw files, without tokenizer or preprocessing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.arrays import IntArray, TokenArray, bisect_right
from data_tools.corpus.token_stream import DocumentOrigin, Span, TokenStream
from data_tools.errors import DataError
from data_tools.files import map_file
from data_tools.tokenization.byte_vocabulary import BYTE_EOD

_OPEN_FILES = 128  # cached mappings; each holds a file descriptor
_FINGERPRINT_BLOCKS = 256
_FINGERPRINT_BLOCK_SIZE = 4096  # bytes
_SCAN_TOKENS = 1 << 22  # block size of a search for document starts
_DOCUMENT_SCAN_TOKENS = 1 << 14  # block size of a search for the ends of one document
_CONTEXT = 2  # ids on either side that decide whether a newline ends a blank line
_NEWLINE, _RETURN = ord("\n"), ord("\r")


class MappedFiles:
    """Bytes of files, mapped on first read; empty files are skipped.

    Raises:
        DataError: there is no file, or all are empty.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        sizes = [_size(file) for file in files]
        self.paths = [file for file, size in zip(files, sizes, strict=True) if size > 0]
        if not self.paths:
            raise DataError(
                f"data.train or data.validation: none of the {len(files)} files of a byte source "
                "has text; check the path"
            )
        self.sizes = np.array([size for size in sizes if size > 0], dtype=np.int64)
        self.map = lru_cache(maxsize=_OPEN_FILES)(self._map_checked)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, sizes and 256 blocks spread over the bytes."""
        folder = os.path.commonpath([os.path.abspath(path.parent) for path in self.paths])
        digest = hashlib.sha256()
        for path, size in zip(self.paths, self.sizes, strict=True):
            digest.update(f"{os.path.relpath(path, folder)}\0{size}\0".encode())
        ends = np.cumsum(self.sizes)
        starts = np.unique(np.linspace(0, ends[-1] - 1, _FINGERPRINT_BLOCKS).astype(np.int64))
        for start, file in zip(starts, np.searchsorted(ends, starts, side="right"), strict=True):
            begin = int(start - ends[file] + self.sizes[file])
            digest.update(self.map(int(file))[begin : begin + _FINGERPRINT_BLOCK_SIZE].tobytes())
        return digest.hexdigest()

    def line_at(self, index: int, offset: int) -> int:
        """Return the number of the line, from 1, at a byte of a file."""
        return 1 + int(np.count_nonzero(self.map(index)[:offset] == _NEWLINE))

    def _map_checked(self, index: int) -> npt.NDArray[np.uint8]:
        data = np.frombuffer(map_file(self.paths[index]), dtype=np.uint8)
        if len(data) != self.sizes[index]:
            raise DataError(
                f"{self.paths[index]}: {len(data)} bytes found, {self.sizes[index]} when the run "
                "started; do not change files that are in use"
            )
        return data


class ByteStream:
    """Bytes of files in sorted order, each file followed by id 256.

    A document is a file, or with `blank_lines` the text between blank lines: there id 256 replaces
    the newline that ends the last blank line between two documents, so that every byte keeps its
    position and no index is needed. A line of "\\r\\n" is blank as well.
    """

    document_end = eod_id = BYTE_EOD
    bos_ids = ()
    is_bytes = True

    def __init__(self, files: MappedFiles, *, blank_lines: bool = False) -> None:
        self._files = files
        self._blank_lines = self.is_scanned = blank_lines
        self._ends = np.cumsum(files.sizes + 1)  # a file is its bytes and one end token
        self._begins = self._ends - files.sizes - 1

    @property
    def num_tokens(self) -> int:
        return int(self._ends[-1])

    @property
    def num_bytes(self) -> int:
        return int(self._files.sizes.sum())

    @property
    def fingerprint(self) -> str:
        return self._files.fingerprint + ("-blank_lines" if self._blank_lines else "")

    def read(self, starts: IntArray, length: int) -> TokenArray:
        return self.read_with_ends(starts, length)[0]

    def read_with_ends(self, starts: IntArray, length: int) -> tuple[TokenArray, IntArray]:
        """Return the result of `read` and the indices of id 256 in its flattened rows, unsorted."""
        context = _CONTEXT if self._blank_lines else 0
        wide, ends = self._read(starts - context, length + 2 * context)
        if self._blank_lines:
            ends = np.concatenate([ends, _blank_line_ends(wide.reshape(-1), ends)])
            rows, columns = np.divmod(ends, length + 2 * context)
            columns -= context
            within = (columns >= 0) & (columns < length)
            ends = (rows * length + columns)[within]
        ids = wide[:, context : context + length].astype(np.uint16, order="C")
        ids.reshape(-1)[ends] = BYTE_EOD
        return ids, ends

    def document_starts(self, begins: IntArray, length: int) -> list[IntArray]:
        if not self._blank_lines:
            return [starts_between(self._ends, begin, length) for begin in begins.tolist()]
        return [find_document_starts(self, begin, length) for begin in begins.tolist()]

    def document_at(self, position: int) -> Span:
        file = find_span(self._ends, position)
        return _find_document(self, position, file) if self._blank_lines else file

    def origin_at(self, position: int) -> DocumentOrigin:
        file = int(np.searchsorted(self._ends, position, side="right"))
        offset = self.document_at(position).begin - int(self._begins[file])
        return DocumentOrigin(
            None if self._blank_lines else file,
            str(self._files.paths[file]),
            self._files.line_at(file, offset),
        )

    def _read(self, starts: IntArray, length: int) -> tuple[npt.NDArray[np.uint8], IntArray]:
        """Read the bytes of spans that may extend beyond the stream, and find the end tokens.

        End tokens are returned as indices into the flattened rows, which hold 0 there. Positions
        outside the stream count as end tokens.
        """
        rows = np.empty((len(starts), length), dtype=np.uint8)
        files = np.searchsorted(self._ends, np.maximum(starts, 0), side="right")
        begins = starts - self._begins[files]
        within = (begins >= 0) & (begins + length <= self._files.sizes[files])
        ends = [np.empty(0, dtype=np.int64)]
        spans = zip(begins.tolist(), files.tolist(), within.tolist(), strict=True)
        for number, (begin, file, is_within) in enumerate(spans):
            if is_within:
                rows[number] = self._files.map(file)[begin : begin + length]
                continue
            ids = self._read_across(int(starts[number]), length, file)
            rows[number] = ids  # keeps only the low byte, 0, of an end token
            ends.append(number * length + np.flatnonzero(ids == BYTE_EOD))
        return rows, np.concatenate(ends)

    def _read_across(self, start: int, length: int, file: int) -> TokenArray:
        ids = np.full(length, BYTE_EOD, dtype=np.uint16)
        position = max(0, start)
        end = min(start + length, self.num_tokens)
        while position < end:
            begin = position - int(self._begins[file])
            piece = self._files.map(file)[begin : begin + end - position]
            ids[position - start : position - start + len(piece)] = piece
            position += len(piece) + 1
            file += 1
        return ids


def find_span(ends: IntArray, position: int) -> Span:
    """Return the span that contains `position`, among consecutive spans with the given ends."""
    index = int(np.searchsorted(ends, position, side="right"))
    return Span(int(ends[index - 1]) if index else 0, int(ends[index]))


def starts_between(ends: IntArray, begin: int, length: int) -> IntArray:
    """Return the starts p of consecutive spans, begin < p < begin + length.

    `ends` may be memory-mapped: only log2(n) of its elements and the result are read.
    """
    first, last = bisect_right(ends, np.array([begin, begin + length - 1])).tolist()
    return np.array(ends[first:last], dtype=np.int64)


def _find_document(stream: TokenStream, position: int, file: Span) -> Span:
    """Find the document at a position of a file by scanning in both directions."""
    begin, end = file
    for first in range(position, file.begin, -_DOCUMENT_SCAN_TOKENS):
        block = Span(max(file.begin, first - _DOCUMENT_SCAN_TOKENS), first)
        found = np.flatnonzero(_ids(stream, block) == BYTE_EOD)
        if len(found):
            begin = block.begin + int(found[-1]) + 1
            break
    for first in range(position, file.end, _DOCUMENT_SCAN_TOKENS):
        block = Span(first, min(file.end, first + _DOCUMENT_SCAN_TOKENS))
        found = np.flatnonzero(_ids(stream, block) == BYTE_EOD)
        if len(found):
            end = block.begin + int(found[0]) + 1
            break
    return Span(begin, end)


def _ids(stream: TokenStream, span: Span) -> TokenArray:
    return stream.read(np.array([span.begin]), span.end - span.begin)[0]


def find_document_starts(stream: TokenStream, begin: int, length: int) -> IntArray:
    """Return the positions p after an id 256, begin < p < begin + length."""
    end = begin + length - 1
    found = [np.empty(0, dtype=np.int64)]
    for first in range(begin, end, _SCAN_TOKENS):
        ids = _ids(stream, Span(first, min(end, first + _SCAN_TOKENS)))
        found.append(first + 1 + np.flatnonzero(ids == BYTE_EOD))
    return np.concatenate(found)


def _blank_line_ends(data: npt.NDArray[np.uint8], file_ends: IntArray) -> IntArray:
    """Return the indices, in flattened rows, of newlines that end the last blank line before text.

    The first and last two columns are context: results there are meaningless. As blank lines are
    rare, every byte is only compared with a newline; the bytes around are checked only where two
    newlines follow each other.
    """
    newline = data == _NEWLINE
    blank = newline[_CONTEXT:-_CONTEXT] & newline[1:-3]
    if b"\r" in data.tobytes():  # three times as fast as a comparison followed by any()
        returns = data[1:-3] == _RETURN
        blank |= newline[_CONTEXT:-_CONTEXT] & returns & newline[:-4]
    indices = _CONTEXT + np.flatnonzero(blank)
    after = data[indices + 1]
    is_followed_by_blank = (after == _NEWLINE) | ((after == _RETURN) & newline[indices + _CONTEXT])
    indices = indices[~is_followed_by_blank]
    return indices[~np.isin(indices + 1, file_ends)] if len(file_ends) else indices


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; check the path") from error
