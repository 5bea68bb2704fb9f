"""OLMo-core: PREFIX.npy, ids and nothing else, and PREFIX.csv.gz with the documents.

    PREFIX.npy      unsigned ids one after another; no header of NumPy's, whatever the name says
    PREFIX.csv.gz   a line `begin,end` in tokens for every document, often with more columns

The dtype is recorded nowhere. It is found here from the last end and the size of the .npy.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.arrays import IntArray, bytes_of
from data_tools.errors import DataError, brief
from data_tools.files import expand_paths
from data_tools.formats.blocks import (
    Block,
    Boundary,
    ReadOptions,
    Source,
    WriteOptions,
    cut_at_ends,
    cut_by_token,
)
from data_tools.formats.manifest import Manifest, read_manifest
from data_tools.formats.raw_files import PartialFiles, RawFile, file_size, raw_file

DTYPES = ("uint8", "uint16", "uint32", "uint64")
_LINES = 1 << 17  # of the metadata read at once
_NUMPY_MAGIC = b"\x93NUMPY"


def open_olmo(paths: Sequence[Path], options: ReadOptions) -> list[Source]:
    """Open .npy files, or those of folders, each with its documents.

    Raises:
        DataError: a file is missing, empty or NumPy's own, or its dtype is not known.
    """
    files = [file for path in paths for file in expand_paths(str(path), suffixes=(".npy",))]
    return [_open(path, options) for path in files]


def _open(path: Path, options: ReadOptions) -> Source:
    size = file_size(path)
    with open(path, "rb") as file:
        if file.read(len(_NUMPY_MAGIC)) == _NUMPY_MAGIC:
            raise DataError(
                f"{path}: {_NUMPY_MAGIC!r} found at byte 0, ids expected; numpy.save wrote it, not "
                "OLMo-core: write its array with tofile"
            )
    metadata = _metadata_of(path)
    prefix = path.with_suffix("")
    recorded = read_manifest(prefix, kind="olmo")
    if metadata.exists():
        dtype = _dtype(path, size, metadata, options)
    elif options.eod is None and options.bos is None and not options.no_boundaries:
        raise DataError(
            f"{path}: no {metadata.name} with its documents beside it; pass --eod ID, the id that "
            "ends every document, and --dtype"
        )
    elif options.eod is None:
        given = "--no-boundaries" if options.bos is None else f"--bos {options.bos}"
        raise DataError(
            f"{path}: no {metadata.name} beside it, and {given} found, --eod expected; pass --eod "
            f"ID, or --from nanogpt --dtype DTYPE with {given}"
        )
    elif options.dtype is None:
        raise DataError(
            f"{path}: no {metadata.name} beside it, and a raw file does not say of which dtype its "
            "ids are; pass --dtype"
        )
    else:
        dtype = np.dtype(options.dtype).newbyteorder("<")
    raw = raw_file(path, dtype)
    return Source(
        name=str(path),
        dtype=dtype,
        num_bytes=raw.num_tokens * dtype.itemsize,
        paths=[path],
        blocks=partial(_blocks, raw, metadata if metadata.exists() else None),
        recorded=recorded,
    )


def _metadata_of(path: Path) -> Path:
    return path.with_suffix(".csv.gz")


def _dtype(path: Path, size: int, metadata: Path, options: ReadOptions) -> np.dtype[Any]:
    """Return the dtype of which the last document ends at the end of the file."""
    last = 0
    for ends in _ends(metadata):
        last = int(ends[-1])
    if last == 0:
        raise DataError(f"{metadata}: it lists 0 tokens; write it again")
    if options.dtype is not None:
        name = options.dtype
    else:
        name = next((n for n in DTYPES if last * np.dtype(n).itemsize == size), "")
    dtype = np.dtype(name or "uint16").newbyteorder("<")
    if last * dtype.itemsize != size:
        remedy = (
            "one of the two is truncated, or text follows the last document: copy both again, or "
            f"remove {metadata.name} and pass --eod and --dtype"
        )
        raise DataError(
            f"{path}: {size} bytes found, but {metadata.name} ends at token {last}, which is no "
            f"size of {name or 'uint8, uint16, uint32 or uint64'} ids; {remedy}"
        )
    return dtype


def _blocks(raw: RawFile, metadata: Path | None, boundary: Boundary) -> Iterator[Block]:
    if metadata is not None:
        return cut_at_ends(raw.parts(), _ends(metadata), raw.path)
    parts = ((ids, offset, raw.path) for ids, offset in raw.parts())
    return cut_by_token(parts, boundary)


def _ends(metadata: Path) -> Iterator[IntArray]:
    """Yield the document ends.

    Raises:
        DataError: the file is damaged, or a document does not begin where the one before ends.
    """
    end = line = 0
    try:
        with gzip.open(metadata, "rt", encoding="utf-8") as file:
            while lines := list(islice(file, _LINES)):
                spans = _parse(lines)
                begins = np.concatenate(([end], spans[:-1, 1]))
                wrong = (spans[:, 0] != begins) | (spans[:, 1] < spans[:, 0])
                if wrong.any():
                    index = int(np.argmax(wrong))
                    raise DataError(
                        f"{metadata}: line {line + index + 1} says {spans[index, 0]},"
                        f"{spans[index, 1]}, a document from {begins[index]} on expected; only "
                        "documents one after another can be converted: write it again with the "
                        "ends of all documents"
                    )
                yield spans[:, 1]
                end, line = int(spans[-1, 1]), line + len(lines)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{metadata}: cannot be read after line {line} ({brief(error, most=100)}); "
            "it is truncated or no metadata of OLMo-core: copy it again, or pass --eod and --dtype "
            "without it"
        ) from error


def _parse(lines: list[str]) -> IntArray:
    # Further columns hold ids and paths of documents, in which anything may stand.
    return np.loadtxt(
        lines, np.int64, comments=None, delimiter=",", usecols=(0, 1), quotechar=None, ndmin=2
    )


class OlmoWriter:
    """Writes OUTPUT.npy and OUTPUT.csv.gz.

    Raises:
        DataError: one exists and `overwrite` is false.
    """

    def __init__(self, output: Path, dtype: np.dtype[Any], options: WriteOptions) -> None:
        ids = output.with_name(output.name + ".npy")
        self._files = PartialFiles(output, [_metadata_of(ids), ids], options)
        # Neither name nor time, so that the same corpus gives the same bytes.
        self._metadata = gzip.GzipFile("", "wb", 1, self._files[0], mtime=0)
        self._num_tokens = self._end = 0

    def add(self, block: Block) -> None:
        self._files[1].write(bytes_of(block.ids))
        if len(block.ends):
            ends = (block.ends + self._num_tokens).tolist()
            spans = zip([self._end, *ends[:-1]], ends, strict=True)
            self._metadata.write("".join(["%d,%d\n" % span for span in spans]).encode())  # noqa: UP031
            self._end = ends[-1]
        self._num_tokens += len(block.ids)

    def finish(self, manifest: Manifest) -> None:
        self._metadata.close()
        self._files.publish(manifest)

    def close(self) -> None:
        with suppress(OSError):  # a full disk
            self._metadata.close()
        self._files.close()
