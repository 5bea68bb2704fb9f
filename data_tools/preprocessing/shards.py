"""Shards, the unit of work of `preprocess`: a few MB of input encoded to a small corpus.

A shard is finished when its `.report` exists, which is written last. Its name is a hash of its
pieces (file, range, size and time of the file), so that only shards of changed files are encoded
again. The order of shards is the order of the input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pydantic import BaseModel, ConfigDict

from data_tools.corpus.indexed_writer import IndexedDatasetWriter
from data_tools.errors import DataError
from data_tools.files import replace_atomically
from data_tools.preprocessing.documents import (
    BadDocumentError,
    PieceReader,
    batch_documents,
    locate,
)
from data_tools.preprocessing.encoding import EncodedDocuments, EncodingSettings, encode_documents
from data_tools.preprocessing.inputs import Piece
from data_tools.preprocessing.workers import ProgressDelta

_SMALLEST_BYTES, _LARGEST_BYTES = 4 << 20, 1 << 30
_MOST_SHARDS = 4096


class Shard(NamedTuple):
    """Consecutive pieces of the input."""

    name: str
    pieces: list[Piece]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


class SourceCounts(BaseModel):
    """Document counts of one `--input` argument."""

    model_config = ConfigDict(strict=True)

    documents: int = 0
    tokens: int = 0
    num_bytes: int = 0
    with_null_bytes: int = 0
    left_out: dict[str, int] = {}
    """Number of documents left out of the corpus, by problem."""

    def add(self, encoded: EncodedDocuments) -> None:
        """Count a batch."""
        self.documents += len(encoded.lengths)
        self.tokens += len(encoded.ids)
        self.num_bytes += encoded.num_bytes
        self.with_null_bytes += encoded.num_with_null
        for _, problem, _ in encoded.left_out:
            self.left_out[problem] = self.left_out.get(problem, 0) + 1

    def merge(self, other: SourceCounts) -> None:
        """Add the counts of another shard."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.num_bytes += other.num_bytes
        self.with_null_bytes += other.with_null_bytes
        for problem, count in other.left_out.items():
            self.left_out[problem] = self.left_out.get(problem, 0) + count


class ShardReport(BaseModel):
    """Contents of a finished shard."""

    model_config = ConfigDict(strict=True)

    sources: dict[int, SourceCounts] = {}
    lines: list[int] = []
    """Number of lines or rows of each piece."""

    @property
    def documents(self) -> int:
        return sum(counts.documents for counts in self.sources.values())


class LeftOut(BaseModel):
    """A document left out of the corpus: one line of PREFIX.left_out.jsonl."""

    model_config = ConfigDict(strict=True)

    file: str
    line: int | None
    problem: str
    detail: str


def shard_bytes(total: int) -> int:
    """Return the shard size: a power of two, so that a little more input does not move all cuts."""
    wanted = max(1, total // _MOST_SHARDS)
    return min(_LARGEST_BYTES, max(_SMALLEST_BYTES, 1 << (wanted - 1).bit_length()))


def plan_shards(pieces: Iterable[Piece], *, num_bytes: int) -> Iterator[Shard]:
    """Group consecutive pieces into shards of up to `num_bytes`."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.size > num_bytes:
            yield Shard(_name(group), group)
            group, size = [], 0
        group.append(piece)
        size += piece.size
    if group:
        yield Shard(_name(group), group)


def _name(pieces: Iterable[Piece]) -> str:
    parts = [f"{p.path}\0{p.begin}\0{p.end}\0{p.stamp}\0" for p in pieces]
    return hashlib.sha256("".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def read_report(folder: Path, shard: Shard) -> ShardReport | None:
    """Read the report of a shard; None if the shard is not finished."""
    try:
        return ShardReport.model_validate_json(report_path(folder, shard).read_bytes())
    except FileNotFoundError:
        return None


def report_path(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.name}.report"


def left_out_path(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.name}.left_out"


def encode_shard(
    shard: Shard, *, settings: EncodingSettings, folder: Path
) -> Iterator[ProgressDelta]:
    """Encode a shard into `folder`, yielding progress.

    Raises:
        DataError: a file is damaged, a document is unusable, or the disk is full. The partial
            shard is then removed.
    """
    tokenizer, text = settings.load_tokenizer(), settings.text_rules()
    report = ShardReport()
    left_out = left_out_path(folder, shard)
    try:
        with (
            IndexedDatasetWriter(
                folder / shard.name, vocab_size=tokenizer.vocab_size, overwrite=True
            ) as writer,
            replace_atomically(left_out) as spool,
        ):
            for piece in shard.pieces:
                yield from _encode_piece(piece, settings, writer, spool, report)
            if report.documents:
                writer.finish(
                    tokenizer=settings.tokenizer,
                    tokenizer_fingerprint=tokenizer.fingerprint,
                    **text._asdict(),
                    num_bytes=sum(counts.num_bytes for counts in report.sources.values()),
                    command="",
                )
        with replace_atomically(report_path(folder, shard)) as file:
            file.write(report.model_dump_json().encode())
    except OSError as error:  # of writing: read errors are already DataErrors
        raise DataError(
            f"{folder}: cannot write shard {shard.name} ({error.strerror}); free space, or choose "
            "an output on another disk"
        ) from error


def _encode_piece(
    piece: Piece,
    settings: EncodingSettings,
    writer: IndexedDatasetWriter,
    spool: BinaryIO,
    report: ShardReport,
) -> Iterator[ProgressDelta]:
    counts = report.sources.setdefault(piece.source, SourceCounts())
    reader = PieceReader(piece, json_key=settings.json_key, max_bytes=settings.max_document_bytes)
    done = 0
    for batch in batch_documents(reader):
        try:
            encoded = encode_documents(batch, settings=settings)
        except BadDocumentError as error:
            # A plain DataError can be pickled; count the line from the start of the file.
            located = locate(error.document, piece)
            raise DataError(str(error.at(located))) from error
        writer.add_documents(encoded.ids, encoded.lengths)
        counts.add(encoded)
        for document, problem, detail in encoded.left_out:
            entry = LeftOut(file=piece.path, line=document.line, problem=problem, detail=detail)
            spool.write(entry.model_dump_json().encode() + b"\n")
        yield ProgressDelta(len(batch), reader.bytes_read - done)
        done = reader.bytes_read
    yield ProgressDelta(0, piece.size - done)
    report.lines.append(reader.lines_read)
