"""MDS, the shards of MosaicML's streaming: a folder of shard.NNNNN.mds and index.json.

    u32       number of samples n
    u32[n+1]  begin of every sample and end of the last, in bytes of the file
    JSON      the columns, up to the first sample
    samples   u32 size of every column of variable size, then the columns, by name

A column `ndarray:uint16` of one dimension is a byte (4 times the dimensions, plus log2 of the width
of the length: 4, 5 or 6), the length in 1, 2 or 4 bytes, and the ids. Without the dtype in its name
the dtype is one more byte before it; with a shape there are only ids.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.arrays import IntArray, TokenArray, bytes_of
from data_tools.errors import DataError
from data_tools.formats.blocks import (
    BLOCK_BYTES,
    Block,
    Boundary,
    ReadOptions,
    Source,
    WriteOptions,
)
from data_tools.formats.manifest import Manifest, read_manifest
from data_tools.formats.mds_shards import Bytes, put, read_shard, take
from data_tools.formats.raw_files import PartialFolder, read_index
from data_tools.formats.whole_documents import WholeDocuments, joined

DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
DEFAULT_COLUMN = "tokens"
_VERSION = 2
_CODES = {8: "uint8", 9: "int8", 16: "uint16", 17: "int16"}
_CODES |= {32: "uint32", 33: "int32", 64: "uint64", 65: "int64"}
_SHARD_BYTES = 56 << 20  # of ids: with the headers less than the size that its own writer keeps to
_SIZE_LIMIT = 1 << 26
_COPIED_AT_ONCE = 1 << 20  # bytes of samples, which stay in the cache of a core


class _Column(NamedTuple):
    """Location of the ids in a sample."""

    name: str
    encoding: str
    before: list[int | None]
    """Sizes of the columns before it, None where they vary."""
    num_variable: int
    """Columns of variable size in all."""
    is_variable: bool
    dtype: str | None
    has_shape: bool
    """Whether the length of an array is stored with it."""


def open_mds(paths: Sequence[Path], options: ReadOptions) -> list[Source]:
    """Open folders of shards.

    Raises:
        DataError: the index or a shard is missing or damaged, or has no such column of ids.
    """
    return [_open(path, options) for path in paths]


def _open(folder: Path, options: ReadOptions) -> Source:
    index = read_index(folder, of="MDS")
    shards = index.get("shards")
    if index.get("version") != _VERSION or not isinstance(shards, list) or not shards:
        raise DataError(
            f"{folder / 'index.json'}: version {index.get('version')} with "
            f"{len(shards) if isinstance(shards, list) else 0} shards found, version {_VERSION} "
            "with 1 or more expected; write it again with MDSWriter"
        )
    # A writer with a small size limit leaves an empty first shard.
    filled = [shard for shard in shards if not isinstance(shard, dict) or shard.get("samples")]
    columns = [_column(folder, shard, options) for shard in filled]
    for column in columns:
        if column != columns[0]:
            raise DataError(
                f"{folder / 'index.json'}: column {column.name!r} is {column.encoding} in one "
                f"shard, {columns[0].encoding} or elsewhere in another; convert them apart"
            )
    if not columns:
        raise DataError(f"{folder}: 0 samples found; pass shards with text")
    name = columns[0].dtype or _dtype_of_first(folder, filled[0], columns[0])
    dtype = np.dtype(name).newbyteorder("<")
    return Source(
        name=str(folder),
        dtype=dtype,
        num_bytes=sum(shard["raw_data"]["bytes"] for shard in filled),
        paths=[folder],
        blocks=partial(_blocks, folder, filled, columns[0], dtype),
        recorded=read_manifest(folder, kind="mds"),
    )


def _column(folder: Path, shard: dict[str, Any], options: ReadOptions) -> _Column:
    name = options.column or DEFAULT_COLUMN
    path = folder / "index.json"
    try:
        names, encodings = shard["column_names"], shard["column_encodings"]
        sizes, kind = shard["column_sizes"], shard["format"]
        if not all(isinstance(each, list) for each in (names, encodings, sizes)):
            raise TypeError(f"{names} with {encodings} and {sizes}")
        numbers = [shard["samples"], shard["raw_data"]["bytes"], *(s or 0 for s in sizes)]
        if not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise TypeError(f"{numbers} for sizes")
        if not all(isinstance(each, str) for each in (*names, *encodings)):
            raise TypeError(f"{names} with {encodings}")
        if not len(names) == len(encodings) == len(sizes):
            raise TypeError(f"{names} with {encodings} and {sizes}")
        shard["raw_data"]["basename"]
        if not isinstance(hashes := shard["raw_data"].get("hashes", {}), dict):
            raise TypeError(f"{hashes} for hashes")
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: shard {str(error)[:60]} cannot be read; it is damaged: copy it again"
        ) from error
    if kind != "mds":
        raise DataError(f"{path}: format {kind} found, mds expected; pass shards of MDSWriter")
    if name not in names:
        raise DataError(
            f"{path}: no column {name!r} (columns: {', '.join(names)}); choose one with --column"
        )
    number = names.index(name)
    encoding, *rest = encodings[number].split(":")
    dtype = (rest or [None])[0]
    shape = rest[1].split(",") if len(rest) > 1 else []
    if encoding == "bytes" and options.dtype is None:
        raise DataError(
            f"{path}: column {name!r} is bytes, which do not say of which dtype their ids are; "
            "pass --dtype, int64 for those of LLM Foundry"
        )
    if encoding != "bytes" and options.dtype is not None:
        raise DataError(
            f"--dtype {options.dtype} has no effect: column {name!r} of {path} is "
            f"{encodings[number]}, which says its own; remove it"
        )
    if encoding not in ("bytes", "ndarray") or len(shape) > 1 or dtype not in (*DTYPES, None):
        raise DataError(
            f"{path}: column {name!r} is {encodings[number]}, not an array of integers in one "
            "dimension; choose another with --column"
        )
    return _Column(
        name,
        encodings[number],
        sizes[:number],
        sum(size is None for size in sizes),
        sizes[number] is None,
        options.dtype if encoding == "bytes" else dtype,
        has_shape=encoding == "ndarray" and not shape,
    )


def _dtype_of_first(folder: Path, shard: dict[str, Any], column: _Column) -> str:
    data, samples = read_shard(folder, shard)
    begin = int(_spans(data, samples, column)[0][0])
    return _dtype_of_code(folder, column, int(data[begin]))


def _dtype_of_code(folder: Path, column: _Column, code: int) -> str:
    if code not in _CODES:
        raise DataError(
            f"{folder}: an array of dtype code {code} found in column {column.name!r}, integers "
            "expected; choose another with --column"
        )
    return _CODES[code]


def _blocks(
    folder: Path,
    shards: Sequence[dict[str, Any]],
    column: _Column,
    dtype: np.dtype[Any],
    boundary: Boundary,
) -> Iterator[Block]:
    for shard in shards:
        data, samples = read_shard(folder, shard)
        path = folder / shard["raw_data"]["basename"]
        begins, ends = _spans(data, samples, column)
        if (ends > samples[1:]).any() or (begins > ends).any():
            raise _damaged(path, samples, ends > samples[1:], "is larger than its sample")
        if column.dtype is None:
            other = data[begins] != data[begins[0]]
            if other.any() or _dtype_of_code(folder, column, int(data[begins[0]])) != dtype.name:
                raise _damaged(path, samples, other, f"is not {dtype.name} as the first one")
            begins = begins + 1
        if column.has_shape:
            begins = _after_shape(path, data, samples, begins, ends, dtype)
        lengths, rest = np.divmod(ends - begins, dtype.itemsize)
        if rest.any():
            raise _damaged(path, samples, rest > 0, f"holds no whole ids of {dtype.name}")
        yield from _join(path, data, begins, ends, lengths, dtype)


def _join(
    path: Path, data: Bytes, begins: IntArray, ends: IntArray, lengths: IntArray, dtype: Any
) -> Iterator[Block]:
    first = 0
    while first < len(begins):
        last = int(np.searchsorted(ends, begins[first] + BLOCK_BYTES, side="right"))
        group = slice(first, max(last, first + 1))
        ids = take(data, begins[group], ends[group])
        yield Block(ids.view(dtype), np.cumsum(lengths[group]), path)
        first = group.stop


def _spans(data: Bytes, samples: IntArray, column: _Column) -> tuple[IntArray, IntArray]:
    """Return begin and end of the column in every sample."""
    heads = samples[:-1]
    begins = heads + 4 * column.num_variable
    variable = 0
    sizes: IntArray | int = 0
    for size in [*column.before, None if column.is_variable else 0]:
        begins = begins + sizes
        if size is None:
            sizes = _gather(data, heads + 4 * variable, 4)
            variable += 1
        else:
            sizes = size
    if not column.is_variable:
        return begins, begins + (samples[1:] - begins)
    return begins, begins + sizes


def _gather(data: Bytes, at: IntArray, width: int) -> IntArray:
    """Return the little-endian numbers of `width` bytes at unaligned places."""
    places = np.minimum(at[:, None] + np.arange(width), len(data) - 1)
    found = np.zeros((len(at), 8), np.uint8)
    found[:, :width] = data[places]
    return found.view("<i8")[:, 0]


def _after_shape(
    path: Path, data: Bytes, samples: IntArray, begins: IntArray, ends: IntArray, dtype: Any
) -> IntArray:
    """Return where the ids begin behind the lengths, which must agree with the sizes."""
    kinds = data[begins]
    if (kinds >> 2 != 1).any():
        raise _damaged(path, samples, kinds >> 2 != 1, "is no array of one dimension")
    after = begins + 1 + (1 << (kinds & 3).astype(np.int64))
    for width in (1, 2, 4, 8):
        chosen = np.flatnonzero((1 << (kinds & 3)) == width)
        lengths = _gather(data, begins[chosen] + 1, width)
        wrong = lengths * dtype.itemsize != (ends - after)[chosen]
        if wrong.any():
            at = np.zeros(len(begins), bool)
            at[chosen[wrong]] = True
            raise _damaged(path, samples, at, "does not have the length that it says")
    return after


def _damaged(path: Path, samples: IntArray, wrong: npt.NDArray[np.bool_], why: str) -> DataError:
    number = int(np.argmax(wrong))
    return DataError(
        f"{path}: the array of sample {number} at byte {samples[number]} {why}; the shard is "
        "damaged or of another writer: copy it again, or choose another --column"
    )


class MdsWriter:
    """Writes the folder OUTPUT with a column of arrays and index.json.

    Raises:
        DataError: it exists and `overwrite` is false.
    """

    def __init__(self, output: Path, dtype: np.dtype[Any], options: WriteOptions) -> None:
        self._config = {
            "column_encodings": [f"ndarray:{dtype.name}"],
            "column_names": [options.column or DEFAULT_COLUMN],
            "column_sizes": [None],
            "compression": None,
            "format": "mds",
            "hashes": [],
            "size_limit": _SIZE_LIMIT,
            "version": _VERSION,
        }
        self._header = json.dumps(self._config, sort_keys=True).encode()
        self._folder = PartialFolder(output, options)
        self._shards: list[dict[str, Any]] = []
        self._documents = WholeDocuments(self._write, group_bytes=_SHARD_BYTES)
        self.add = self._documents.add

    def _write(self, parts: list[TokenArray], lengths: IntArray) -> None:
        ids = joined(parts)
        sizes = _head_sizes(lengths) + lengths * ids.itemsize
        first = 4 + 4 * (len(lengths) + 1) + len(self._header)
        samples = first + np.concatenate(([0], np.cumsum(sizes)))
        name = f"shard.{len(self._shards):05}.mds"
        if not self._folder.is_kept(name):
            with open(self._folder.path / name, "xb") as file:
                file.write(struct.pack("<I", len(lengths)))
                file.write(samples.astype("<u4").tobytes())
                file.write(self._header)
                for part in _samples_of(ids, lengths, samples - first):
                    file.write(bytes_of(part))
            self._folder.complete(name)
        raw = {"basename": name, "bytes": int(samples[-1]), "hashes": {}}
        shard = {"raw_data": raw, "samples": len(lengths), "zip_data": None}
        self._shards.append({**self._config, **shard})

    def finish(self, manifest: Manifest) -> None:
        self._documents.flush()
        index = json.dumps({"shards": self._shards, "version": _VERSION}, sort_keys=True)
        (self._folder.path / "index.json").write_text(index, encoding="utf-8")
        self._folder.publish(manifest)

    def close(self) -> None:
        self._folder.close()


def _widths(lengths: IntArray) -> IntArray:
    """Return the bytes in which the lengths of arrays are written."""
    return np.where(lengths < 1 << 8, 1, np.where(lengths < 1 << 16, 2, 4))


def _head_sizes(lengths: IntArray) -> IntArray:
    """Return the bytes before the ids: the size of the column, the kind and length of its array."""
    return 5 + _widths(lengths)


def _samples_of(ids: TokenArray, lengths: IntArray, begins: IntArray) -> Iterator[Bytes]:
    """Yield samples, of which `begins` are the places and the end, several at a time."""
    ends = np.cumsum(lengths)
    first = 0
    while first < len(lengths):
        last = int(np.searchsorted(begins, begins[first] + _COPIED_AT_ONCE, side="right")) - 1
        group = slice(first, max(last, first + 1))
        part = ids[ends[first] - lengths[first] : ends[group.stop - 1]]
        samples = np.empty(begins[group.stop] - begins[first], np.uint8)
        heads = begins[group] - begins[first]
        widths = _widths(lengths[group])
        for width in (1, 2, 4):
            chosen = widths == width
            head = _heads(lengths[group][chosen], width, ids.itemsize)
            samples[heads[chosen][:, None] + np.arange(head.shape[1])] = head
        last_bytes = begins[first + 1 : group.stop + 1] - begins[first]
        put(samples, heads + _head_sizes(lengths[group]), last_bytes, part.view(np.uint8))
        yield samples
        first = group.stop


def _heads(lengths: IntArray, width: int, itemsize: int) -> Bytes:
    """Return what stands before the ids of arrays whose lengths take `width` bytes, as rows."""
    head = np.dtype([("size", "<u4"), ("kind", "u1"), ("length", f"<u{width}")])
    heads = np.empty(len(lengths), head)
    heads["size"] = 1 + width + lengths * itemsize
    heads["kind"] = 4 + width.bit_length() - 1
    heads["length"] = lengths
    return heads.view(np.uint8).reshape(len(lengths), head.itemsize)
