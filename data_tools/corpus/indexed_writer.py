"""Streaming writer of .bin/.idx corpora with bounded memory and atomic output."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from data_tools.arrays import IntArray, bytes_of
from data_tools.corpus.corpus_info import CorpusInfo, SourceInfo, info_path
from data_tools.corpus.indexed import DTYPES, HEADER, MAGIC, VERSION, IndexedDataset, IndexPaths
from data_tools.errors import DataError
from data_tools.files import (
    Digest,
    conversion_marks,
    flush_to_disk,
    open_partial,
    partial_path,
    sync_folder,
)
from data_tools.progress import ReportProgress
from data_tools.tokenization.special_tokens import SpecialTokens

_MAX_DOCUMENT_TOKENS = np.iinfo(np.int32).max  # the index stores lengths as int32
_CHUNK = 1 << 20  # documents per block of index entries
_CODES = {name: code for code, name in DTYPES.items()}


def vocab_size_of(dtype: np.dtype[Any]) -> int:
    """Return the largest vocabulary size that a token dtype can hold."""
    return int(np.iinfo(dtype).max) + 1


def smallest_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger | np.signedinteger]:
    """Return the narrowest token dtype of the format for ids in [0, vocab_size)."""
    if vocab_size <= 1 << 8:
        return np.dtype(np.uint8)
    if vocab_size <= 1 << 16:
        return np.dtype(np.uint16)
    return np.dtype(np.int32 if vocab_size <= 1 << 31 else np.int64)


def check_absent(prefix: Path) -> None:
    """Refuse to overwrite an existing output.

    Raises:
        DataError: one of its three files exists.
    """
    paths = (*IndexPaths.of(prefix), info_path(prefix))
    # A link counts if what it leads to is gone, too: its disk may be away.
    existing = [path for path in paths if os.path.lexists(path)]
    if existing:
        raise DataError(
            f"{existing[0]} exists; choose another output or pass --overwrite to replace it"
        )


class IndexedDatasetWriter:
    """Writes documents in batches; `finish` publishes the corpus.

    Use it as a context manager: leaving it without `finish` removes everything written.
    The index is renamed last, so that a prefix with an .idx is complete.

    Raises:
        DataError: the output exists and `overwrite` is false, or another process is writing it.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        *,
        vocab_size: int,
        overwrite: bool = False,
        with_info: bool = True,
        stored_in: Path | None = None,
        open_bin: Callable[[Path], BinaryIO] | None = None,
    ) -> None:
        """`with_info=False`: `finish_without_info` will be called, which needs no checksum.

        `stored_in`: a file that holds the ids already; .bin becomes a link to it. `open_bin`: opens
        the partial file of .bin, which is written from its beginning to its end, as a conversion
        does that goes on in its own.
        """
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.dtype = smallest_dtype(vocab_size)
        self.paths = IndexPaths.of(self.prefix)
        if not overwrite:
            check_absent(self.prefix)
        # The lock on .bin.partial also protects the other two files.
        self._bin = (open_bin or open_partial)(self.paths.bin)
        if open_bin is None:
            # A killed conversion would take what is written here for its own.
            conversion_marks(self.prefix).unlink(missing_ok=True)
        self._lengths_path = self.prefix.with_name(self.prefix.name + ".lengths")
        self._lengths = open_partial(self._lengths_path)
        self._link_path = self.paths.bin.with_name(self.paths.bin.name + ".link")
        self._bin_digest = Digest()
        self._with_info = with_info
        self._stored_in = stored_in
        self._num_tokens = 0
        self._open_tokens = 0  # of the document that goes on
        self.num_documents = 0
        self._max_token_id = -1

    def add_document(self, ids: npt.ArrayLike) -> None:
        """Append one document of token ids."""
        array = np.asarray(ids)
        self.add_documents(array, np.array([len(array)]))

    def add_documents(self, ids: npt.ArrayLike, lengths: IntArray) -> None:
        """Append documents whose tokens are concatenated in `ids`; empty ones are dropped.

        Raises:
            DataError: an id is outside [0, vocab_size) or a document has 2**31 tokens or more.
        """
        tokens = np.asarray(ids)
        if int(lengths.sum()) != len(tokens):
            raise ValueError(f"lengths add up to {lengths.sum()}, but there are {len(tokens)} ids")
        self.add_block(tokens, np.cumsum(lengths))
        self._bin_digest.wait()  # the caller's array may change

    def add_block(self, tokens: npt.NDArray[Any], ends: IntArray) -> None:
        """Append ids among which documents end at `ends`, ascending; empty ones are dropped.

        A document may go on in the next call. `tokens` must not be changed afterwards.

        Raises:
            DataError: an id is outside [0, vocab_size) or a document has 2**31 tokens or more.
        """
        if len(tokens) == 0 and len(ends) == 0:
            return
        lengths = np.diff(ends, prepend=-self._open_tokens)
        rest = len(tokens) - int(ends[-1]) if len(ends) else self._open_tokens + len(tokens)
        longest = max(int(lengths.max(initial=0)), rest)
        if longest > _MAX_DOCUMENT_TOKENS:
            index = int(np.argmax(lengths)) if rest < longest else len(lengths)
            raise DataError(
                f"{self.prefix}: document {self.num_documents + index} has {longest} tokens or "
                f"more; at most {_MAX_DOCUMENT_TOKENS} fit: split it"
            )
        largest = self._check_ids(tokens, ends)
        data = bytes_of(np.ascontiguousarray(tokens, self.dtype))
        if self._with_info:
            self._bin_digest.update(data)
        if self._stored_in is None:
            self._bin.write(data)
        lengths = lengths[lengths > 0]
        self._lengths.write(lengths.astype("<i4").tobytes())
        self._num_tokens += len(tokens)
        self.num_documents += len(lengths)
        self._open_tokens = rest
        self._max_token_id = max(self._max_token_id, largest)

    def finish(
        self,
        *,
        tokenizer: str,
        tokenizer_fingerprint: str,
        eod_id: int | None,
        num_bytes: int,
        command: str,
        bos_ids: tuple[int, ...] | None = (),
        special_tokens: SpecialTokens | None = "plain",
        license: str | None = None,
        sources: Sequence[SourceInfo] = (),
        left_out_sha256: str | None = None,
    ) -> CorpusInfo:
        """Write the index and the sidecar, and publish the three files.

        Raises:
            DataError: no document was added.
        """
        self._check_not_empty()
        assert self._with_info, "else nothing was hashed"
        info = CorpusInfo(
            tokenizer=tokenizer,
            tokenizer_fingerprint=tokenizer_fingerprint,
            vocab_size=self.vocab_size,
            eod_id=eod_id,
            bos_ids=bos_ids or (),
            special_tokens=special_tokens or "plain",
            dtype=self.dtype.name,
            num_tokens=self._num_tokens,
            num_documents=self.num_documents,
            num_bytes=num_bytes,
            max_token_id=self._max_token_id,
            bin_sha256=self._bin_digest.hexdigest(),
            idx_sha256=self._write_index(),
            command=command,
            licence=license,
            sources=tuple(sources),
            left_out_sha256=left_out_sha256,
        )
        self._publish(info)
        return info

    def finish_without_info(self) -> None:
        """Publish only the two files of Megatron's format, for a corpus of unknown tokenizer.

        Raises:
            DataError: no document was added.
        """
        self._check_not_empty()
        self._write_index()
        self._publish(None)

    def _check_not_empty(self) -> None:
        if self.num_documents == 0:
            raise DataError(
                f"{self.prefix}: the input holds no documents with text, so nothing was written; "
                "pass an input with text"
            )

    def _check_ids(self, tokens: npt.NDArray[np.integer], ends: IntArray) -> int:
        """Return the largest id."""
        if not np.issubdtype(tokens.dtype, np.integer):
            raise DataError(
                f"{self.prefix}: token ids are {tokens.dtype}, integers expected; convert them"
            )
        largest = int(tokens.max()) if len(tokens) else -1
        is_unsigned = np.issubdtype(tokens.dtype, np.unsignedinteger)
        if largest < self.vocab_size and (is_unsigned or tokens.min(initial=0) >= 0):
            return largest
        position = int(np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))[0])
        document = int(np.searchsorted(ends, position, side="right"))
        begin = int(ends[document - 1]) if document else -self._open_tokens
        raise DataError(
            f"{self.prefix}: token id {tokens[position]} at token {position - begin} of document "
            f"{self.num_documents + document} is outside [0, {self.vocab_size}); use the "
            "vocabulary size of the tokenizer that made it"
        )

    def _write_index(self) -> str:
        """Write the .idx from the spooled lengths in chunks, and return its SHA-256."""
        self._lengths.flush()
        lengths = np.memmap(partial_path(self._lengths_path), dtype="<i4", mode="r")
        digest = hashlib.sha256()
        with open_partial(self.paths.idx) as file:

            def write(data: bytes) -> None:
                file.write(data)
                digest.update(data)

            count = self.num_documents
            write(HEADER.pack(MAGIC, VERSION, _CODES[self.dtype.name], count, count + 1))
            chunks = [slice(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK)]
            for chunk in chunks:
                write(lengths[chunk].tobytes())
            offset = 0
            for chunk in chunks:
                sizes = lengths[chunk] * np.int64(self.dtype.itemsize)
                ends = offset + np.cumsum(sizes)
                write((ends - sizes).astype("<i8").tobytes())
                offset = int(ends[-1])
            for begin in range(0, count + 1, _CHUNK):
                end = min(begin + _CHUNK, count + 1)
                write(np.arange(begin, end, dtype="<i8").tobytes())
            flush_to_disk(file)
        return digest.hexdigest()

    def _link(self, target: Path) -> None:
        """Write the link that replaces .bin."""
        expected = self._num_tokens * self.dtype.itemsize
        if (size := target.stat().st_size) != expected:
            raise DataError(
                f"{target}: {size} bytes found, {expected} expected; it holds more than the ids of "
                "the corpus, so that they cannot be read where they are: convert with a copy"
            )
        self._link_path.unlink(missing_ok=True)  # of a killed writer
        self._link_path.symlink_to(target.resolve())

    def _publish(self, info: CorpusInfo | None) -> None:
        sidecar = info_path(self.prefix)
        if info is not None:
            with open_partial(sidecar) as file:
                file.write(info.to_bytes())
                flush_to_disk(file)
        flush_to_disk(self._bin)
        if self._stored_in is not None:  # which may be refused, before anything is replaced
            self._link(self._stored_in)
        # Remove the old index first, so that no mismatched pair can be opened in between.
        self.paths.idx.unlink(missing_ok=True)
        if info is None:
            sidecar.unlink(missing_ok=True)
        if self._stored_in is not None:
            os.replace(self._link_path, self.paths.bin)
        whole = [] if self._stored_in is not None else [self.paths.bin]
        for path in (*whole, *([] if info is None else [sidecar]), self.paths.idx):
            os.replace(partial_path(path), path)
        sync_folder(self.prefix.parent)
        self._close()

    def _close(self) -> None:
        files: tuple[BinaryIO, ...] = (self._bin, self._lengths)
        for file in files:
            # On a full disk closing fails as well; the data it would flush is discarded anyway.
            with suppress(OSError):
                file.close()
        for path in (*self.paths, info_path(self.prefix), self._lengths_path):
            partial_path(path).unlink(missing_ok=True)
        self._link_path.unlink(missing_ok=True)

    def leave(self) -> None:
        """Close the files under their partial names, for a later writer to go on in .bin."""
        for file in (self._bin, self._lengths):
            with suppress(OSError):  # a full disk; what is marked is on it
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._bin.closed:
            self._close()


def append_corpora(
    writer: IndexedDatasetWriter, datasets: Iterable[IndexedDataset], report: ReportProgress
) -> None:
    """Append all documents of corpora to a writer, in chunks.

    Raises:
        DataError: the checksum of a corpus differs from its sidecar's, so that damage is not
            copied.
    """
    documents = num_bytes = 0
    for dataset in datasets:
        digest = hashlib.sha256()
        for chunk in dataset.chunks():
            digest.update(chunk.ids.tobytes())
            writer.add_documents(chunk.ids, chunk.lengths)
            documents += len(chunk.lengths)
            num_bytes += chunk.ids.nbytes
            report(documents, num_bytes)
        if dataset.info is not None and digest.hexdigest() != dataset.info.bin_sha256:
            raise DataError(
                f"{dataset.paths.bin}: SHA-256 {digest.hexdigest()} found, "
                f"{dataset.info.bin_sha256} expected; it is damaged: preprocess it again"
            )
