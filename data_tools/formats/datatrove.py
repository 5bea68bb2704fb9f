"""datatrove, which nanotron reads: FILE.ds with ids and FILE.ds.index with the ends of documents.

    FILE.ds        u16 or u32 ids one after another, little-endian
    FILE.ds.index  u64 end of every document in tokens; no header, no leading 0

The width of an id is in FILE.ds.metadata at best. It is found here from the last end and the size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.arrays import IntArray, bytes_of
from data_tools.errors import DataError
from data_tools.files import expand_paths
from data_tools.formats.blocks import (
    Block,
    Boundary,
    ReadOptions,
    Source,
    WriteOptions,
    cut_at_ends,
)
from data_tools.formats.manifest import Manifest, read_manifest
from data_tools.formats.raw_files import PartialFiles, RawFile, file_size, raw_file

DTYPES = ("uint16", "uint32")
_END = np.dtype("<u8")


def open_datatrove(paths: Sequence[Path], options: ReadOptions) -> list[Source]:
    """Open .ds files, or those of folders, each with its index.

    Raises:
        DataError: a file or its index is missing, truncated or damaged.
    """
    files = [file for path in paths for file in expand_paths(str(path), suffixes=(".ds",))]
    # An empty .ds with an empty index is what datatrove leaves behind the last full file.
    opened = [_open(path) for path in files if not _is_empty(path)]
    if not opened:
        raise DataError(f"{paths[0]}: all {len(files)} .ds files hold 0 ids; tokenize again")
    return opened


def _index_of(path: Path) -> Path:
    return path.with_name(path.name + ".index")


def _is_empty(path: Path) -> bool:
    index = _index_of(path)
    return index.exists() and path.stat().st_size == 0 == index.stat().st_size


def _open(path: Path) -> Source:
    size = file_size(path)
    index_path = _index_of(path)
    loss = path.with_name(path.name + ".loss")
    if loss.exists():
        raise DataError(
            f"{loss}: it says which ids of {path.name} are trained on, which no output can hold; "
            "move it away to train on all of them"
        )
    remedy = "without it the documents are not known: copy it too, or pass --from nanogpt and --eod"
    index = _open_index(index_path, remedy=remedy)
    last = 0
    for ends in _ends(index):
        last = int(ends[-1])
    dtypes = _dtypes(path)
    dtype = next((each for each in dtypes if last * each.itemsize == size), None)
    if dtype is None:
        sizes = " or ".join(f"{last * each.itemsize} bytes of {each.name}" for each in dtypes)
        raise DataError(
            f"{path}: {size} bytes found, but {index_path.name} ends at token {last}, which makes "
            f"{sizes}; one of the two is truncated: copy both again"
        )
    raw = raw_file(path, dtype.newbyteorder("<"))
    return Source(
        name=str(path),
        dtype=raw.dtype,
        num_bytes=size,
        paths=[path],
        blocks=partial(_blocks, raw, index),
        recorded=read_manifest(path.with_suffix(""), kind="datatrove"),
    )


def _dtypes(path: Path) -> list[np.dtype[Any]]:
    """Return the dtype that FILE.ds.metadata names, else those there are.

    Raises:
        DataError: it names none of these.
    """
    metadata = path.with_name(path.name + ".metadata")
    if not metadata.exists():
        return [np.dtype(name) for name in DTYPES]
    with open(metadata, encoding="utf-8", errors="replace") as file:
        width = file.readline(1 << 12).rstrip().rpartition("|")[2]
    if width not in ("2", "4"):
        raise DataError(
            f"{metadata}: {width[:20]!r} bytes for an id found at the end of line 1, 2 or 4 "
            "expected; remove it, or tokenize again"
        )
    return [np.dtype("uint16" if width == "2" else "uint32")]


def _open_index(path: Path, *, remedy: str) -> RawFile:
    """Open an index.

    Raises:
        DataError: it is missing, empty or ends within a number.
    """
    size = file_size(path, remedy=remedy)
    if size % _END.itemsize:
        raise DataError(
            f"{path}: {size} bytes found, a multiple of 8 expected; it is truncated: copy it again"
        )
    return RawFile(path, _END, 0, size // _END.itemsize)


def _blocks(raw: RawFile, index: RawFile, boundary: Boundary) -> Iterator[Block]:
    return cut_at_ends(raw.parts(), _ends(index), raw.path)


def _ends(index: RawFile) -> Iterator[IntArray]:
    """Yield the document ends.

    Raises:
        DataError: one is smaller than the one before it.
    """
    end = 0
    for ends, offset in index.parts():
        steps = np.diff(ends.view("<i8"), prepend=end)
        if (steps < 0).any():
            wrong = int(np.argmax(steps < 0))
            raise DataError(
                f"{index.path}: document end {ends[wrong]} at byte {offset + 8 * wrong} is smaller "
                "than the one before it; it is big-endian or damaged: copy it again"
            )
        yield ends.view("<i8")
        end = int(ends[-1])


class DatatroveWriter:
    """Writes OUTPUT.ds and OUTPUT.ds.index.

    Raises:
        DataError: one exists and `overwrite` is false.
    """

    def __init__(self, output: Path, dtype: np.dtype[Any], options: WriteOptions) -> None:
        path = output.with_name(output.name + ".ds")
        self._files = PartialFiles(output, [_index_of(path), path], options)
        self._num_tokens = 0

    def add(self, block: Block) -> None:
        self._files[1].write(bytes_of(block.ids))
        self._files[0].write(bytes_of((block.ends + self._num_tokens).astype(_END)))
        self._num_tokens += len(block.ids)

    def finish(self, manifest: Manifest) -> None:
        self._files.publish(manifest)

    def close(self) -> None:
        self._files.close()
