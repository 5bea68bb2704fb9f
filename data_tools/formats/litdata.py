"""litdata: a folder of chunk-R-N.bin and index.json, as its TokensLoader reads them.

    u32       number of items n; an item is a document
    u32[n+1]  begin of every item and end of the last, in bytes of the file
    ids       of all items, one after another, without headers of their own

The dtype is a number in `data_format` of index.json, in one table for torch tensors and another for
NumPy arrays. `dim`, the tokens of a chunk, says that the loader may read it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.arrays import IntArray, TokenArray, bytes_of
from data_tools.errors import DataError
from data_tools.formats.blocks import (
    Block,
    Boundary,
    ReadOptions,
    Source,
    WriteOptions,
    cut_at_ends,
)
from data_tools.formats.manifest import Manifest, read_manifest
from data_tools.formats.raw_files import (
    PartialFolder,
    RawFile,
    file_size,
    listed_file,
    read_index,
)
from data_tools.formats.whole_documents import WholeDocuments

_TENSOR_DTYPES = {11: "uint8", 12: "int8", 13: "int16", 14: "int16", 15: "int32", 16: "int32"}
_TENSOR_DTYPES |= {17: "int64", 18: "int64", 20: "uint16"}
_NUMPY_DTYPES = dict(enumerate(("int8", "int16", "int32", "int64")))
_NUMPY_DTYPES |= dict(enumerate(("uint8", "uint16", "uint32", "uint64"), start=4))
_TABLES = {"no_header_tensor": _TENSOR_DTYPES, "no_header_numpy": _NUMPY_DTYPES}
DTYPES = tuple(_NUMPY_DTYPES.values())
_CHUNK_BYTES = 64_000_000  # its own "64MB"


def open_litdata(paths: Sequence[Path], options: ReadOptions) -> list[Source]:
    """Open folders of chunks.

    Raises:
        DataError: the index or a chunk is missing or damaged, or holds no bare ids.
    """
    return [_open(path) for path in paths]


def _open(folder: Path) -> Source:
    path = folder / "index.json"
    index = read_index(folder, of="litdata")
    try:
        config, chunks = index["config"], index["chunks"]
        data_format = "|".join(config["data_format"])
        serializer, _, number = data_format.partition(":")
        listed = [(each["filename"], int(each["chunk_size"]), each["dim"]) for each in chunks]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: {str(error)[:60]} in its config or chunks, which lack what is needed; it is "
            "damaged or of another version: copy it again, or write it with TokensLoader"
        ) from error
    for option in ("compression", "encryption", "compression_level"):
        if config.get(option):
            raise DataError(
                f"{path}: {option} {str(config[option])[:40]} found, none can be read; write the "
                f"chunks again without {option}"
            )
    dtype = _dtype(path, serializer, number, data_format)
    files = [
        _open_chunk(listed_file(folder, name, index="index.json"), size, dim, dtype)
        for name, size, dim in listed
    ]
    return Source(
        name=str(folder),
        dtype=dtype,
        num_bytes=sum(file.num_tokens for file in files) * dtype.itemsize,
        paths=[folder],
        blocks=partial(_blocks, files),
        recorded=read_manifest(folder, kind="litdata"),
    )


def _dtype(path: Path, serializer: str, number: str, data_format: str) -> np.dtype[Any]:
    table = _TABLES.get(serializer, {})
    name = table.get(int(number)) if number.isdecimal() else None
    if name is None:
        raise DataError(
            f"{path}: data_format {data_format} found, no_header_tensor or no_header_numpy with an "
            "integer dtype expected; write one-dimensional arrays of ids"
        )
    return np.dtype(name).newbyteorder("<")


def _open_chunk(path: Path, size: int, dim: object, dtype: np.dtype[Any]) -> RawFile:
    """Return the ids of a chunk, whose header agrees with the index and the size of the file."""
    found = file_size(path, remedy="copy all files that index.json lists")
    with open(path, "rb") as file:
        (num_items,) = struct.unpack("<I", file.read(4).ljust(4, b"\0"))
        if num_items != size:
            raise DataError(
                f"{path}: {num_items} items found at byte 0, {size} expected by index.json; it is "
                "another chunk or big-endian: copy it again"
            )
        begin = 4 * (size + 2)
        file.seek(begin - 4)
        (end,) = struct.unpack("<I", file.read(4).ljust(4, b"\0"))
    num_tokens, rest = divmod(end - begin, dtype.itemsize)
    # Where the first item is empty, its own writer counts no tokens.
    if end != found or rest or dim not in (None, num_tokens):
        raise DataError(
            f"{path}: {found} bytes found, {end} expected by its header (byte {begin - 4}) for "
            f"{dim} ids of {dtype.name}; it is truncated or damaged: copy it again"
        )
    return RawFile(path, dtype, begin, num_tokens)


def _blocks(files: Sequence[RawFile], boundary: Boundary) -> Iterator[Block]:
    for file in files:
        yield from cut_at_ends(file.parts(), iter([_ends(file)]), file.path)


def _ends(file: RawFile) -> IntArray:
    """Return the document ends of a chunk.

    Raises:
        DataError: they are not ascending whole ids.
    """
    offsets = np.fromfile(file.path, "<u4", file.begin // 4 - 1, offset=4).astype(np.int64)
    ends, rest = np.divmod(offsets - file.begin, file.dtype.itemsize)
    wrong = (np.diff(ends, prepend=0) < 0) | (rest > 0)
    if wrong.any() or ends[0] != 0 or ends[-1] != file.num_tokens:
        number = int(np.argmax(wrong))
        raise DataError(
            f"{file.path}: offset {offsets[number]} found at byte {4 * (number + 1)}, ascending "
            f"ones from {file.begin} on expected; it is damaged: copy it again"
        )
    return ends[1:]


class LitdataWriter:
    """Writes the folder OUTPUT with chunks of NumPy arrays and index.json.

    Raises:
        DataError: it exists and `overwrite` is false.
    """

    def __init__(self, output: Path, dtype: np.dtype[Any], options: WriteOptions) -> None:
        number = next(n for n, name in _NUMPY_DTYPES.items() if name == dtype.name)
        self._data_format = f"no_header_numpy:{number}"
        self._folder = PartialFolder(output, options)
        self._chunks: list[dict[str, Any]] = []
        self._documents = WholeDocuments(self._write, group_bytes=_CHUNK_BYTES)
        self.add = self._documents.add

    def _write(self, parts: list[TokenArray], lengths: IntArray) -> None:
        begin = 4 * (len(lengths) + 2)
        offsets = begin + np.concatenate(([0], np.cumsum(lengths * parts[0].itemsize)))
        name = f"chunk-0-{len(self._chunks)}.bin"
        if not self._folder.is_kept(name):
            with open(self._folder.path / name, "xb") as file:
                file.write(struct.pack("<I", len(lengths)))
                file.write(offsets.astype("<u4").tobytes())
                for part in parts:
                    file.write(bytes_of(part))
            self._folder.complete(name)
        size = {
            "chunk_bytes": int(offsets[-1]),
            "chunk_size": len(lengths),
            "dim": int(lengths.sum()),
        }
        self._chunks.append({**size, "filename": name})

    def finish(self, manifest: Manifest) -> None:
        self._documents.flush()
        config = {
            "chunk_bytes": _CHUNK_BYTES,
            "chunk_size": None,
            "compression": None,
            "data_format": [self._data_format],
            # A tree of one leaf, in the words of torch's pytree.
            "data_spec": '[1, {"type": null, "context": null, "children_spec": []}]',
            "encryption": None,
            "item_loader": "TokensLoader",
        }
        index = json.dumps({"chunks": self._chunks, "config": config}, sort_keys=True)
        (self._folder.path / "index.json").write_text(index, encoding="utf-8")
        self._folder.publish(manifest)

    def close(self) -> None:
        self._folder.close()
