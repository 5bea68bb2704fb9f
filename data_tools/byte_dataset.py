"""Raw files as a token stream: no tokenizer, nothing to preprocess."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.errors import DataError
from data_tools.indexed import map_file
from data_tools.permutation import IntArray, TokenArray
from data_tools.token_stream import Span, TokenStream

BYTE_EOD = 256
BYTE_VOCAB_SIZE = 257  # 256 byte values and the end of a document; a model may have more
_OPEN_FILES = 128  # mappings kept: each holds a file descriptor
_FINGERPRINT_BLOCKS = 256
_FINGERPRINT_BLOCK_SIZE = 4096  # bytes
_SCANNED_TOKENS = 1 << 22  # read at once when documents are looked for
_SCANNED_AROUND = 1 << 14  # and when one document is
_CONTEXT = 2  # ids on either side that decide whether a newline ends a blank line
_NEWLINE, _RETURN = ord("\n"), ord("\r")


class MappedFiles:
    """The bytes of files, mapped when first read; empty files are left out.

    Raises:
        DataError: no file, or none with a byte in it.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        sizes = [_size(file) for file in files]
        self.paths = [file for file, size in zip(files, sizes, strict=True) if size > 0]
        if not self.paths:
            raise DataError(
                f"the {len(files)} files of a byte source hold no byte; "
                "check data.train and data.validation"
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
        places = np.unique(np.linspace(0, ends[-1] - 1, _FINGERPRINT_BLOCKS).astype(np.int64))
        for place, file in zip(places, np.searchsorted(ends, places, side="right"), strict=True):
            begin = int(place - ends[file] + self.sizes[file])
            digest.update(self.map(int(file))[begin : begin + _FINGERPRINT_BLOCK_SIZE].tobytes())
        return digest.hexdigest()

    def _map_checked(self, index: int) -> npt.NDArray[np.uint8]:
        data = np.frombuffer(map_file(self.paths[index]), dtype=np.uint8)
        if len(data) != self.sizes[index]:
            raise DataError(
                f"{self.paths[index]}: {len(data)} bytes found, {self.sizes[index]} when the run "
                "started; do not change files that are in use"
            )
        return data


class ByteStream:
    """The bytes of files in sorted order, each file ending with id 256.

    A document is a file, or with `blank_lines` what blank lines separate: there id 256 takes the
    place of the newline that ends the last blank line between two documents, so that every byte
    keeps its place and nothing is indexed. A line of "\\r\\n" is blank as well.
    """

    document_end = eod_id = BYTE_EOD

    def __init__(self, files: MappedFiles, *, blank_lines: bool = False) -> None:
        self._files = files
        self._blank_lines = blank_lines
        self._ends = np.cumsum(files.sizes + 1)  # a file is its bytes and one end token

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
        if not self._blank_lines:
            return self._read(starts, length)
        wide = self._read(starts - _CONTEXT, length + 2 * _CONTEXT)
        wide.flat[_blank_line_ends(wide)] = BYTE_EOD
        return wide[:, _CONTEXT:-_CONTEXT]

    def document_starts(self, begins: IntArray, length: int) -> list[IntArray]:
        return [find_document_starts(self, begin, length) for begin in begins.tolist()]

    def document_at(self, place: int) -> Span:
        file = find_span(self._ends, place)
        return _around(self, place, file) if self._blank_lines else file

    def _read(self, starts: IntArray, length: int) -> TokenArray:
        """Spans that may reach over both ends of the stream, filled up with end tokens."""
        ids = np.empty((len(starts), length), dtype=np.uint16)
        first_files = np.searchsorted(self._ends, np.maximum(starts, 0), side="right")
        for row, start, file in zip(ids, starts.tolist(), first_files.tolist(), strict=True):
            if start < 0 or start + length > self.num_tokens:
                row[:] = BYTE_EOD
                row = row[max(0, -start) : self.num_tokens - start]
            self._read_span(row, max(0, start), file)
        return ids

    def _read_span(self, out: TokenArray, start: int, file: int) -> None:
        filled = 0
        while filled < len(out):
            size = int(self._files.sizes[file])
            begin = start + filled - (int(self._ends[file]) - size - 1)
            piece = self._files.map(file)[begin : begin + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            if filled < len(out):
                out[filled] = BYTE_EOD
                filled += 1
            file += 1


def find_span(ends: IntArray, place: int) -> Span:
    """Which of the spans that end at `ends`, each where the next begins, holds a place."""
    index = int(np.searchsorted(ends, place, side="right"))
    return Span(int(ends[index - 1]) if index else 0, int(ends[index]))


def _around(stream: TokenStream, place: int, file: Span) -> Span:
    """The document at a place of a file, found by reading on either side of it."""
    begin, end = file
    for first in range(place, file.begin, -_SCANNED_AROUND):
        block = Span(max(file.begin, first - _SCANNED_AROUND), first)
        found = np.flatnonzero(_ids(stream, block) == BYTE_EOD)
        if len(found):
            begin = block.begin + int(found[-1]) + 1
            break
    for first in range(place, file.end, _SCANNED_AROUND):
        block = Span(first, min(file.end, first + _SCANNED_AROUND))
        found = np.flatnonzero(_ids(stream, block) == BYTE_EOD)
        if len(found):
            end = block.begin + int(found[0]) + 1
            break
    return Span(begin, end)


def _ids(stream: TokenStream, span: Span) -> TokenArray:
    return stream.read(np.array([span.begin]), span.end - span.begin)[0]


def find_document_starts(stream: TokenStream, begin: int, length: int) -> IntArray:
    """Positions p, begin < p < begin + length, that follow an id 256."""
    end = begin + length - 1
    found = [np.empty(0, dtype=np.int64)]
    for first in range(begin, end, _SCANNED_TOKENS):
        ids = _ids(stream, Span(first, min(end, first + _SCANNED_TOKENS)))
        found.append(first + 1 + np.flatnonzero(ids == BYTE_EOD))
    return np.concatenate(found)


def _blank_line_ends(ids: TokenArray) -> IntArray:
    """Places, in the flattened rows, of newlines that end the last blank line before more text.

    The first and last two columns are context. Blank lines are few: all ids are only compared with
    a newline, what is around it is looked at where one follows another.
    """
    flat, width = ids.reshape(-1), ids.shape[1]
    newline = flat == _NEWLINE
    blank = newline[_CONTEXT:-_CONTEXT] & newline[1:-3]
    returns = flat == _RETURN
    if returns.any():
        blank |= newline[_CONTEXT:-_CONTEXT] & returns[1:-3] & newline[:-4]
    places = _CONTEXT + np.flatnonzero(blank)
    columns = places % width
    places = places[(columns >= _CONTEXT) & (columns < width - _CONTEXT)]
    after = flat[places + 1]
    ends_blank = (after == _NEWLINE) | ((after == _RETURN) & newline[places + _CONTEXT])
    return places[~ends_blank & (after != BYTE_EOD)]


def expand_paths(pattern: str, *, suffixes: tuple[str, ...] = ()) -> list[Path]:
    """Files of a path, a directory (recursively, no hidden files) or a glob, sorted.

    `suffixes` limits what is taken from directories.

    Raises:
        DataError: there is no such file.
    """
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [
            file
            for file in path.rglob("*")
            if file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
            and (not suffixes or file.name.endswith(suffixes))
        ]
    else:
        files = [Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
    if not files:
        wanted = f" with {', '.join(suffixes)}" if suffixes and path.is_dir() else ""
        raise DataError(f"{pattern}: no such file, or nothing in it{wanted}; check the path")
    return sorted(files)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; check the path") from error
