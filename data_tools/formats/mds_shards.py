"""The files of MDS shards: found, decompressed, checked against their hashes, cut into samples."""

from __future__ import annotations

import bz2
import hashlib
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.arrays import IntArray, bytes_of
from data_tools.errors import DataError, brief
from data_tools.formats.raw_files import listed_file

Bytes = npt.NDArray[np.uint8]
_LONG_BYTES = 1 << 10


def read_shard(folder: Path, shard: dict[str, Any]) -> tuple[Bytes, IntArray]:
    """Return a shard, decompressed, and the begins of its samples with the end of the last.

    Raises:
        DataError: it is missing, truncated or of an unknown compression, or its hash differs.
    """
    raw = shard["raw_data"]
    path = listed_file(folder, raw["basename"], index="index.json")
    data: Bytes
    if path.is_file() and path.stat().st_size:
        data = np.memmap(path, np.uint8, "r")
    else:
        path, data = _decompressed(folder, shard, path)
    if len(data) != raw["bytes"]:
        raise DataError(
            f"{path}: {len(data)} bytes found, {raw['bytes']} expected by index.json; it is "
            "truncated: copy it again"
        )
    for name, expected in raw.get("hashes", {}).items():
        if name in hashlib.algorithms_guaranteed and not name.startswith("shake"):
            found = hashlib.new(name, bytes_of(data)).hexdigest()
            if found != expected:
                raise DataError(
                    f"{path}: {name} {found} found, {expected} expected by index.json; it is "
                    "damaged: copy it again"
                )
    return data, _samples(path, data, shard["samples"])


def _samples(path: Path, data: Bytes, count: int) -> IntArray:
    found = struct.unpack_from("<I", bytes_of(data))[0] if len(data) >= 4 else 0
    table = 4 + 4 * (found + 1)
    if found != count or table > len(data):
        raise DataError(
            f"{path}: {found} samples found at byte 0, {count} expected by index.json; it is "
            "another shard or big-endian: copy it again"
        )
    samples = np.frombuffer(data, "<u4", count + 1, 4).astype(np.int64)
    if samples[0] < table or samples[-1] != len(data) or (np.diff(samples) <= 0).any():
        raise DataError(
            f"{path}: samples at bytes {samples[0]} to {samples[-1]} found at byte 4, ascending "
            f"ones from {table} to {len(data)} expected; it is damaged: copy it again"
        )
    return samples


def _decompressed(folder: Path, shard: dict[str, Any], raw: Path) -> tuple[Path, Bytes]:
    zipped = shard.get("zip_data")
    if not zipped:
        raise DataError(f"{raw}: no such file, but index.json lists it; copy it too")
    path = listed_file(folder, zipped["basename"], index="index.json")
    codec = str(shard.get("compression")).partition(":")[0]
    decompress = _CODECS.get(codec)
    if decompress is None:
        raise DataError(
            f"{path}: compression {codec} found, one of {', '.join(_CODECS)} expected; decompress "
            f"it to {raw.name} with streaming"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: no such file, but index.json lists it; copy it too") from error
    try:
        return path, np.frombuffer(decompress(content, shard["raw_data"]["bytes"]), np.uint8)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            f"{path}: cannot be decompressed ({brief(error, most=100)}); it is "
            "truncated or damaged: copy it again"
        ) from error


def _zstd(content: bytes, size: int) -> bytes:
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(content) as reader:
            return bytes(reader.read(size + 1))  # no more: the index says how much there is
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


_CODECS: dict[str, Callable[[bytes, int], bytes]] = {
    "zstd": _zstd,
    "gz": lambda content, size: zlib.decompressobj(31).decompress(content, size + 1),
    "bz2": lambda content, size: bz2.BZ2Decompressor().decompress(content, size + 1),
}


def take(data: Bytes, begins: IntArray, ends: IntArray) -> Bytes:
    """Return the bytes of ascending spans, one after another."""
    if _are_long(begins, ends):
        view, spans = bytes_of(data), zip(begins.tolist(), ends.tolist(), strict=True)
        return np.frombuffer(b"".join([view[begin:end] for begin, end in spans]), np.uint8)
    first, last = begins[0], ends[-1]
    return data[first:last][_inside(last - first, begins - first, ends - first)]


def put(data: Bytes, begins: IntArray, ends: IntArray, values: Bytes) -> None:
    """Write values into ascending spans, one after another; the inverse of `take`."""
    if not _are_long(begins, ends):
        data[_inside(len(data), begins, ends)] = values
        return
    view, source, first = bytes_of(data), bytes_of(values), 0
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        view[begin:end] = source[first : first + end - begin]
        first += end - begin


def _are_long(begins: IntArray, ends: IntArray) -> bool:
    """Whether one copy for each span costs less than a mask over all bytes, which NumPy copies run
    by run."""
    num_bytes = int((ends - begins).sum())
    return num_bytes >= _LONG_BYTES * len(begins) or ends[-1] - begins[0] > 2 * num_bytes


def _inside(size: int, begins: IntArray, ends: IntArray) -> npt.NDArray[np.bool_]:
    """Return the mask of ascending spans, of which the last ends at `size`."""
    gap_begins = np.concatenate(([0], ends[:-1]))
    gaps = begins - gap_begins
    mask = np.ones(size, bool)
    counted = np.arange(int(gaps.sum())) - np.repeat(np.cumsum(gaps) - gaps, gaps)
    mask[np.repeat(gap_begins, gaps) + counted] = False
    return mask
