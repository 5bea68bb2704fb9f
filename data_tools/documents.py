"""Text documents of input files, streamed: .jsonl (one object a line) and .txt (one a file)."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import zstandard

from data_tools.byte_dataset import expand_paths
from data_tools.errors import DataError

_FORMATS = (".jsonl", ".txt")
SUFFIXES = tuple(kind + packing for kind in _FORMATS for packing in ("", ".gz", ".zst"))
MAX_DOCUMENT_BYTES = 64 << 20
_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1024
_ZSTD_CHUNK = 1 << 14


class RawDocument(NamedTuple):
    """One undecoded document: a line of a .jsonl file, or a whole .txt file (`line` is None)."""

    path: str
    line: int | None
    data: bytes

    @property
    def place(self) -> str:
        """`file:line`, as an editor understands it."""
        return self.path if self.line is None else f"{self.path}:{self.line}"


class BadDocumentError(DataError):
    """A document that is not what its file's suffix promises; `--on-bad-line skip` passes it."""


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Files of paths, directories and globs, in the order given and sorted inside each.

    Raises:
        DataError: nothing is found, a file has another suffix, or one is named twice.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        for file in expand_paths(pattern, suffixes=SUFFIXES):
            if not file.name.endswith(SUFFIXES):
                raise DataError(
                    f"{file}: suffix not known; {', '.join(_FORMATS)} expected, plain or with .gz "
                    "or .zst"
                )
            if file in files:
                raise DataError(f"{file} is named twice by --input; leave one out")
            files[file] = None
    return list(files)


class DocumentReader:
    """Iterate over the documents of files with bounded memory.

    `total_bytes` and `bytes_read` count bytes of the files as they lie on disk.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        self.total_bytes = sum(file.stat().st_size for file in self._files)
        self.bytes_read = 0

    def __iter__(self) -> Iterator[RawDocument]:
        """Yield documents; blank lines of .jsonl files are no documents.

        Raises:
            DataError: a file is damaged, or a document is larger than 64 MiB.
        """
        self.bytes_read = 0
        for file in self._files:
            before = self.bytes_read
            with open(file, "rb") as raw:
                try:
                    for document in _read_file(file, raw):
                        self.bytes_read = before + raw.tell()
                        yield document
                except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
                    raise DataError(
                        f"{file}: cannot be read to its end near byte {raw.tell()} ({error}); it "
                        "is truncated or damaged: get it again"
                    ) from error
                self.bytes_read = before + file.stat().st_size


def extract_text(document: RawDocument, *, json_key: str) -> str:
    """Decode a document.

    Raises:
        BadDocumentError: it is not UTF-8 or not a JSON object with a text under `json_key`.
    """
    try:
        text = document.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDocumentError(
            f"{document.place}: byte {error.start} is not valid UTF-8; convert the file, or pass "
            "--on-bad-line skip"
        ) from error
    return text if document.line is None else _json_text(document, text, json_key)


def batch_documents(documents: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    """Group documents to about a MiB, so that handing them to a process costs little."""
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


def _json_text(document: RawDocument, line: str, json_key: str) -> str:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"not valid JSON ({error})"
    else:
        text = record.get(json_key) if isinstance(record, dict) else None
        if isinstance(text, str) and _is_encodable(text):
            return text
        if not isinstance(record, dict):
            reason = f"a JSON {type(record).__name__} found, an object expected"
        elif json_key not in record:
            reason = f"no key {json_key!r} (keys: {', '.join(map(repr, list(record)[:5]))})"
        elif not isinstance(text, str):
            reason = f"{json_key!r} is a {type(text).__name__}, not text"
        else:
            reason = f"{json_key!r} holds a lone surrogate, which is no text"
    raise BadDocumentError(
        f"{document.place}: {reason}; repair the line, choose --json-key, or pass "
        "--on-bad-line skip"
    )


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_file(file: Path, raw: BinaryIO) -> Iterator[RawDocument]:
    stream = _unpack(file, raw)
    if file.name.removesuffix(".gz").removesuffix(".zst").endswith(".txt"):
        data = stream.read(MAX_DOCUMENT_BYTES + 1)
        yield _checked(RawDocument(str(file), None, data))
        return
    number = 0
    while data := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        if data.strip():
            yield _checked(RawDocument(str(file), number, data))


def _checked(document: RawDocument) -> RawDocument:
    if len(document.data) > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{document.place}: a document of more than {MAX_DOCUMENT_BYTES >> 20} MiB; split it, "
            "or train on the raw file with data.kind=bytes"
        )
    return document


def _unpack(file: Path, raw: BinaryIO) -> IO[bytes]:
    if file.suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if file.suffix == ".zst":
        return io.BufferedReader(_ZstdReader(raw))
    return raw


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a .zst file, one frame after the other.

    zstandard's own `stream_reader` ends a truncated file early without an error (seen in 0.25).
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._raw.read(_ZSTD_CHUNK)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the compressed data ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            self._unpacked = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count
