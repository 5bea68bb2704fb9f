"""Streaming readers of text documents with bounded memory."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import zstandard

from data_tools.errors import DataError
from data_tools.json_lines import quick_text
from data_tools.preprocessing.arrow_files import read_rows
from data_tools.preprocessing.inputs import Piece, count_lines

MAX_DOCUMENT_BYTES = 16 << 20
"""Hugging Face tokenizers take about 130 bytes of memory per byte of a document: 2 GB."""
_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1024
_ZSTD_CHUNK = 1 << 11  # 4 bytes can expand to 128 KiB, and a chunk to 64 MiB


class RawDocument(NamedTuple):
    """One undecoded document: a line, a row, or a whole .txt file (`line` is None)."""

    path: str
    line: int | None
    data: bytes
    is_json: bool = False
    too_large: bool = False
    """If true, `data` is empty: the document was skipped in the file."""

    @property
    def location(self) -> str:
        """`file:line`, as editors accept it."""
        return self.path if self.line is None else f"{self.path}:{self.line}"


class BadDocumentError(DataError):
    """Malformed document; `--on-bad-line skip` leaves it out.

    `problem` is the kind of problem, equal for all documents that have it.
    """

    def __init__(self, document: RawDocument, problem: str, *, detail: str, remedy: str) -> None:
        super().__init__(f"{document.location}: {detail}; {remedy}, or pass --on-bad-line skip")
        self.document = document
        self.problem = problem
        self.detail = detail
        self._remedy = remedy

    def at(self, document: RawDocument) -> BadDocumentError:
        """Return the same error for a document whose line is known."""
        return BadDocumentError(document, self.problem, detail=self.detail, remedy=self._remedy)


class PieceReader:
    """Iterates over the documents of a piece; the data of those over `max_bytes` are skipped.

    `bytes_read` is the approximate number of bytes read from the file on disk, and `lines_read` the
    number of lines or rows. In a piece of unknown first line, lines are numbered from its start.
    """

    def __init__(self, piece: Piece, *, json_key: str, max_bytes: int | None = None) -> None:
        self._piece = piece
        self._json_key = json_key
        self._max_bytes = _limit(piece.path, max_bytes)
        self.bytes_read = 0
        self.lines_read = 0

    def __iter__(self) -> Iterator[RawDocument]:
        """Yield documents; blank lines of .jsonl files are skipped.

        Raises:
            DataError: the file is damaged.
        """
        piece = self._piece
        self.bytes_read = self.lines_read = 0
        if piece.format in ("parquet", "arrow"):
            yield from self._rows()
        else:
            with _open(piece.path) as raw:
                try:
                    yield from self._text(raw)
                except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
                    raise DataError(
                        f"{piece.path}: cannot be read to its end near byte {raw.tell()} "
                        f"({error}); it is truncated or damaged: replace the file"
                    ) from error
        self.bytes_read = piece.size

    def _text(self, raw: BinaryIO) -> Iterator[RawDocument]:
        piece = self._piece
        stream = _decompress(Path(piece.path), raw)
        if piece.format == "txt":
            data = stream.read(_size_to_read(self._max_bytes))
            yield self._whole_or_too_large(RawDocument(piece.path, None, data))
            return
        first = piece.first_line or 0
        if piece.begin > 0:
            raw.seek(piece.begin - 1)
            _finish_line(raw)
        # Only uncompressed files are cut into pieces; others are read to the end of the stream.
        end = piece.end if stream is raw else None
        for data in _lines(stream, end, self._max_bytes):
            self.lines_read += 1
            self.bytes_read = raw.tell() - piece.begin
            if not data.isspace():
                line = first + self.lines_read
                yield self._whole_or_too_large(RawDocument(piece.path, line, data, is_json=True))

    def _rows(self) -> Iterator[RawDocument]:
        piece = self._piece
        first = piece.first_line or 0
        rows = read_rows(
            Path(piece.path), piece.format, self._json_key, begin=piece.begin, end=piece.end
        )
        for data in rows:
            self.lines_read += 1
            line = first + self.lines_read
            yield self._whole_or_too_large(RawDocument(piece.path, line, data or b""))

    def _whole_or_too_large(self, document: RawDocument) -> RawDocument:
        if self._max_bytes is None or len(document.data) <= self._max_bytes:
            return document
        return document._replace(data=b"", too_large=True)


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; check the path") from error


class DocumentReader:
    """Iterates over the documents of several pieces in order; see `PieceReader`."""

    def __init__(
        self, pieces: Iterable[Piece], *, json_key: str, max_bytes: int | None = None
    ) -> None:
        self._pieces = list(pieces)
        self._json_key = json_key
        self._max_bytes = max_bytes
        self.total_bytes = sum(piece.size for piece in self._pieces)
        self.bytes_read = 0

    def __iter__(self) -> Iterator[RawDocument]:
        done = 0
        for piece in self._pieces:
            reader = PieceReader(piece, json_key=self._json_key, max_bytes=self._max_bytes)
            for document in reader:
                self.bytes_read = done + reader.bytes_read
                yield document
            done += piece.size
        self.bytes_read = done


def extract_text(
    document: RawDocument, *, json_key: str, max_bytes: int | None = MAX_DOCUMENT_BYTES
) -> str:
    """Decode a document; `max_bytes` is the limit of its reader.

    Raises:
        BadDocumentError: it is too large, not UTF-8, or not a JSON object with text under
            `json_key`.
    """
    if document.too_large:
        limit = f"{(_limit(document.path, max_bytes) or 0) >> 20} MiB"
        raise BadDocumentError(
            document,
            f"larger than {limit}",
            detail=f"a document of more than {limit}, for which a tokenizer would need gigabytes",
            remedy="split it, raise --max-document-megabytes",
        )
    if document.is_json and (found := quick_text(document.data, json_key)) is not None:
        return found
    try:
        text = document.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDocumentError(
            document,
            "not UTF-8",
            detail=f"byte {error.start} is not valid UTF-8",
            remedy="convert the file",
        ) from error
    return _json_text(document, text, json_key) if document.is_json else text


def batch_documents(documents: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    """Group documents into batches of about 1 MiB to amortise the cost of tokenizer calls."""
    batch: list[RawDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.data)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def locate(document: RawDocument, piece: Piece) -> RawDocument:
    """Return the document with its line number in the file, which requires reading the file."""
    if piece.first_line is not None or document.line is None:
        return document
    with open(piece.path, "rb") as file:
        file.seek(piece.begin - 1)
        begin = piece.begin - 1 + _finish_line(file)
    return document._replace(line=document.line + count_lines(piece.path, end=begin))


def _json_text(document: RawDocument, line: str, json_key: str) -> str:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        problem, detail = "not valid JSON", f"not valid JSON ({error})"
    else:
        text = record.get(json_key) if isinstance(record, dict) else None
        if isinstance(text, str) and _is_encodable(text):
            return text
        problem = f"no text under {json_key!r}"
        if not isinstance(record, dict):
            detail = f"a JSON {type(record).__name__} found, an object expected"
        elif json_key not in record:
            detail = f"no key {json_key!r} (keys: {', '.join(map(repr, list(record)[:5]))})"
        elif not isinstance(text, str):
            detail = f"{json_key!r} is of type {type(text).__name__}, not text"
        else:
            detail = f"{json_key!r} holds a lone surrogate, which is not valid text"
    raise BadDocumentError(
        document, problem, detail=detail, remedy="repair the line, choose --json-key"
    )


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _limit(path: str, max_bytes: int | None) -> int | None:
    """Return the size limit of documents; compressed files always have one, to bound memory."""
    return MAX_DOCUMENT_BYTES if max_bytes is None and path.endswith((".gz", ".zst")) else max_bytes


def _size_to_read(max_bytes: int | None) -> int:
    """Return the size for `read` and `readline`: one byte over the limit; -1 without a limit."""
    return -1 if max_bytes is None else max_bytes + 1


def _lines(stream: IO[bytes], end: int | None, max_bytes: int | None) -> Iterator[bytes]:
    """Yield lines that start before `end`; lines that are too long are cut just over the limit."""
    position = stream.tell() if end is not None else 0
    while end is None or position < end:
        line = stream.readline(_size_to_read(max_bytes))
        if not line:
            return
        position += len(line)
        if max_bytes is not None and len(line) > max_bytes and not line.endswith(b"\n"):
            position += _finish_line(stream)
        yield line


def _finish_line(stream: IO[bytes]) -> int:
    """Skip to the end of a line of any length, and return the number of bytes skipped."""
    count = 0
    while data := stream.readline(_BATCH_BYTES):
        count += len(data)
        if data.endswith(b"\n"):
            break
    return count


def _decompress(file: Path, raw: BinaryIO) -> IO[bytes]:
    if file.suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if file.suffix == ".zst":
        return io.BufferedReader(_ZstdReader(raw))
    return raw


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of all frames of a .zst file.

    zstandard's own `stream_reader` ends a truncated file without an error (seen in 0.25).
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._compressed = b""
        self._decompressed = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decompressed:
            self._compressed = self._compressed or self._raw.read(_ZSTD_CHUNK)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the compressed data ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            self._decompressed = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._decompressed))
        buffer[:count] = self._decompressed[:count]
        self._decompressed = self._decompressed[count:]
        return count
