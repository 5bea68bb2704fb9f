"""Byte stream over the text of one field of .jsonl files, parsed on every read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.arrays import IntArray, TokenArray
from data_tools.corpus.byte_dataset import MappedFiles, find_span, starts_between
from data_tools.corpus.token_stream import DocumentOrigin, Span
from data_tools.errors import DataError
from data_tools.json_lines import quick_text
from data_tools.tokenization.byte_vocabulary import BYTE_EOD


class JsonlStream:
    """UTF-8 bytes of the text under `json_key` of every line, each document followed by id 256.

    Opening parses every line once to measure its text without JSON escapes; reading a line parses
    it again. Blank lines and empty texts are skipped. `JsonlCache` holds the same tokens in a cache
    file and parses nothing again.

    Raises:
        DataError: a line is not an object with text under `json_key`, or no line has any.
    """

    document_end = eod_id = BYTE_EOD
    bos_ids = ()
    is_bytes = True

    def __init__(self, files: MappedFiles, *, json_key: str) -> None:
        self._files = files
        self._json_key = json_key
        lines = [_scan(path, json_key) for path in files.paths]
        self._files_of = np.repeat(np.arange(len(lines)), [len(each) for each in lines])
        self._begins, self._line_sizes, self._text_sizes = np.concatenate(lines).T
        if len(self._begins) == 0:
            raise no_text_error(files, json_key)
        self._ends = np.cumsum(self._text_sizes + 1)

    @property
    def num_tokens(self) -> int:
        return int(self._ends[-1])

    @property
    def num_bytes(self) -> int:
        return int(self._text_sizes.sum())

    @property
    def fingerprint(self) -> str:
        return f"{self._files.fingerprint}-jsonl-{self._json_key}"

    def read(self, starts: IntArray, length: int) -> TokenArray:
        ids = np.empty((len(starts), length), dtype=np.uint16)
        documents = np.searchsorted(self._ends, starts, side="right")
        for row, start, document in zip(ids, starts.tolist(), documents.tolist(), strict=True):
            self._read_span(row, start, document)
        return ids

    def document_starts(self, begins: IntArray, length: int) -> list[IntArray]:
        return [starts_between(self._ends, begin, length) for begin in begins.tolist()]

    def document_at(self, position: int) -> Span:
        return find_span(self._ends, position)

    def origin_at(self, position: int) -> DocumentOrigin:
        document = int(np.searchsorted(self._ends, position, side="right"))
        file = int(self._files_of[document])
        line = self._files.line_at(file, int(self._begins[document]))
        return DocumentOrigin(document, str(self._files.paths[file]), line)

    def _read_span(self, out: TokenArray, start: int, document: int) -> None:
        filled = 0
        while filled < len(out):
            text = self._text(document)
            begin = start + filled - (int(self._ends[document]) - len(text) - 1)
            piece = np.frombuffer(text, dtype=np.uint8)[begin : begin + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            if filled < len(out):
                out[filled] = BYTE_EOD
                filled += 1
            document += 1

    def _text(self, document: int) -> bytes:
        file, begin = int(self._files_of[document]), int(self._begins[document])
        line = self._files.map(file)[begin : begin + int(self._line_sizes[document])]
        location = f"{self._files.paths[file]}, byte {begin}"
        text = _text_of(line.tobytes(), self._json_key, location)
        if len(text) != self._text_sizes[document]:
            raise DataError(
                f"{location}: {len(text)} bytes of text found, {self._text_sizes[document]} when "
                "the run started; do not change files that are in use"
            )
        return text


class Line(NamedTuple):
    """Number (from 1), byte offset, byte size and text of a line that has text."""

    number: int
    begin: int
    size: int
    text: bytes


def lines_of(path: Path, json_key: str) -> Iterator[Line]:
    """Iterate over the lines of a file that have text.

    Raises:
        DataError: a line is not an object with text under `json_key`.
    """
    begin = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                text = _text_of(line, json_key, f"{path}:{number}")
                if text:
                    yield Line(number, begin, len(line), text)
            begin += len(line)


def no_text_error(files: MappedFiles, json_key: str) -> DataError:
    return DataError(
        f"{files.paths[0]}: neither it nor the {len(files.paths) - 1} files beside it have text "
        f"under {json_key!r}; check data.train and data.json_key"
    )


def _scan(path: Path, json_key: str) -> IntArray:
    """Return offset and size of every line that has text, and the size of its text, [lines, 3]."""
    found = [(line.begin, line.size, len(line.text)) for line in lines_of(path, json_key)]
    return np.array(found, dtype=np.int64).reshape(-1, 3)


def _text_of(line: bytes, json_key: str, location: str) -> bytes:
    if (found := quick_text(line, json_key)) is not None:
        return found.encode()
    try:
        record: Any = json.loads(line)
        text = record.get(json_key) if isinstance(record, dict) else None
        if isinstance(text, str):
            return text.encode()
        reason = f"no text under {json_key!r}"
    except (ValueError, RecursionError) as error:
        reason = f"not JSON of valid text ({error})"
    raise DataError(f"{location}: {reason}; repair the line or set data.json_key")
