"""The common form of all formats: blocks of ids, with the ends of documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from data_tools.arrays import IntArray, TokenArray
from data_tools.corpus.corpus_info import CorpusInfo
from data_tools.files import open_partial
from data_tools.formats.manifest import Manifest
from data_tools.formats.resuming import Resumption

BLOCK_BYTES = 8 << 20  # of ids held at once
NO_ENDS: IntArray = np.zeros(0, np.int64)


class Block(NamedTuple):
    """Consecutive ids of a corpus and where documents end among them.

    A document may go on in the next block, so that its length does not bound the memory.
    """

    ids: TokenArray
    ends: IntArray
    """Ascending, in (0, len(ids)]: an end between two blocks is the first one's. An empty document
    repeats the end before it, which may be that of the block before, 0."""
    path: Path
    offset: int | None = None
    """Byte of the file where the ids begin; None where they are not stored one after another."""


class Boundary(NamedTuple):
    """The tokens that end and begin every document, as far as they are known."""

    eod: int | None = None
    bos: int | None = None


class ReadOptions(NamedTuple):
    """Options of the command line about the input."""

    eod: int | None = None
    bos: int | None = None
    dtype: str | None = None
    column: str | None = None
    no_boundaries: bool = False


class WriteOptions(NamedTuple):
    """Options of the command line about the output."""

    overwrite: bool = False
    column: str | None = None
    shard_tokens: int | None = None
    info: CorpusInfo | None = None
    """The .json that the corpus had as Megatron's, and gets again."""
    stored_in: Path | None = None
    """The file of the input, which stays the only copy of the ids."""
    resumption: Resumption | None = None
    """What a killed conversion left."""

    @property
    def may_replace(self) -> bool:
        """Whether an existing output is replaced."""
        return self.overwrite or (self.resumption is not None and self.resumption.may_replace)

    @property
    def is_left(self) -> bool:
        """Whether partial files stay when they are closed."""
        return self.resumption is not None and self.resumption.is_left

    def open_stream(self, path: Path) -> BinaryIO:
        """Open the partial file of `path`, which is written from its beginning to its end."""
        return open_partial(path) if self.resumption is None else self.resumption.open_stream(path)


class Source(NamedTuple):
    """An opened corpus, whose files were found and whose headers are valid."""

    name: str
    dtype: np.dtype[Any]
    num_bytes: int
    """Bytes of ids, for progress; approximate where they are compressed."""
    paths: Sequence[Path]
    """Its files, or the folder of all of them."""
    blocks: Callable[[Boundary], Iterator[Block]]
    """Its documents; where none are recorded, they are cut at the boundary."""
    recorded: Manifest | None = None
    """Counts, checksums and origin recorded beside the corpus."""


class Sink(Protocol):
    """A corpus that is being written; nothing of it can be read before `finish`."""

    def add(self, block: Block) -> None:
        """Append ids, in the dtype of the sink, and document ends."""

    def finish(self, manifest: Manifest) -> None:
        """Publish the corpus."""

    def close(self) -> None:
        """Remove what is not published."""


def read_ahead(blocks: Iterator[Block]) -> Iterator[Block]:
    """Yield blocks, of which the next is read in a thread while one is written."""
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(next, blocks, None)
        while (block := pending.result()) is not None:
            pending = thread.submit(next, blocks, None)
            yield block


def cut_at_ends(
    parts: Iterable[tuple[TokenArray, int]], ends: Iterator[IntArray], path: Path
) -> Iterator[Block]:
    """Yield the parts of a file (ids and the byte where they begin) with its ascending `ends`.

    `ends` come in arrays, in tokens from the beginning of the file.
    """
    pending, exhausted, begin = NO_ENDS, False, 0
    for ids, offset in parts:
        while not exhausted and (len(pending) == 0 or pending[-1] <= begin + len(ids)):
            more = next(ends, None)
            exhausted = more is None
            pending = pending if more is None else np.concatenate((pending, more))
        count = int(np.searchsorted(pending, begin + len(ids), side="right"))
        yield Block(ids, pending[:count] - begin, path, offset)
        pending, begin = pending[count:], begin + len(ids)


def cut_by_token(
    parts: Iterable[tuple[TokenArray, int, Path]], boundary: Boundary
) -> Iterator[Block]:
    """Yield parts of one stream, cut before every `bos`, else after every `eod`, else not at all.

    Ids after the last `eod` are the last document.
    """
    eod, bos = boundary
    last: Block | None = None
    for ids, offset, path in parts:
        if bos is not None:
            ends = np.flatnonzero(ids == bos)
            if len(ends) and ends[0] == 0:
                ends = ends[1:]
                if last is not None:
                    last = last._replace(ends=np.append(last.ends, len(last.ids)))
        else:
            ends = NO_ENDS if eod is None else np.flatnonzero(ids == eod) + 1
        if last is not None:
            yield last
        last = Block(ids, ends, path, offset)
    if last is not None:
        size = len(last.ids)
        if len(last.ends) == 0 or last.ends[-1] < size:
            last = last._replace(ends=np.append(last.ends, size))
        yield last
