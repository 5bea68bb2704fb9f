"""llm.c and modded-nanogpt: .bin shards of ids behind a header of 256 int32.

    i32[256]  magic, version, number of ids n, then zeros
    u16[n]    magic 20240520, version 1 (llm.c's gpt-2, modded-nanogpt)
    u32[n]    magic 20240801, version 7 (llm.c's llama-3)

The shards of one corpus are one stream: their writers cut them at a number of tokens, also within a
document, and put the end token of GPT-2 (50256) before every document, not after it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_tools.arrays import bytes_of
from data_tools.errors import DataError
from data_tools.files import start_writing_back
from data_tools.formats.blocks import Block, ReadOptions, Source, WriteOptions
from data_tools.formats.manifest import Manifest, read_manifest
from data_tools.formats.nanogpt import stream_blocks
from data_tools.formats.raw_files import (
    PartialFolder,
    RawFile,
    file_size,
    numbered_files,
    raw_file,
)

DTYPES = ("uint16", "uint32")
SHARD_TOKENS = 100_000_000  # as in the shards of FineWeb that both projects train on
_MAX_TOKENS = (1 << 31) - 1  # of a shard: the header holds an int32
_HEADER = struct.Struct("<256i")
_EVALUATION_MAGIC = 20240522


class _Variant(NamedTuple):
    magic: int
    version: int
    dtype: str


_VARIANTS = (_Variant(20240520, 1, "uint16"), _Variant(20240801, 7, "uint32"))


def open_llmc(paths: Sequence[Path], options: ReadOptions) -> list[Source]:
    """Open shards, in the given order, or the .bin files of a folder, as one stream.

    Raises:
        DataError: a header is damaged, disagrees with the size of its file or with other shards.
    """
    shards = [shard for path in paths for shard in numbered_files(path, ".bin", is_stream=True)]
    files = [_open_shard(path) for path in shards]
    for file in files:
        if file.dtype != files[0].dtype:
            raise DataError(
                f"{file.path}: {file.dtype.name} ids found, {files[0].dtype.name} expected as in "
                f"{files[0].path}; convert shards of two tokenizers apart"
            )
    recorded = read_manifest(paths[0], kind="llmc") if len(paths) == 1 else None
    return [
        Source(
            name=str(paths[0]),
            dtype=files[0].dtype,
            num_bytes=sum(file.num_tokens for file in files) * files[0].dtype.itemsize,
            paths=shards,
            blocks=partial(stream_blocks, files),
            recorded=recorded,
        )
    ]


def _open_shard(path: Path) -> RawFile:
    size = file_size(path)
    with open(path, "rb") as file:
        content = file.read(_HEADER.size)
    if len(content) < _HEADER.size:
        raise DataError(
            f"{path}: {size} bytes found, a header of {_HEADER.size} expected; it is truncated or "
            "no shard of llm.c: copy it again, or pass --from nanogpt for ids alone"
        )
    magic, version, num_tokens = _HEADER.unpack(content)[:3]
    variant = next((each for each in _VARIANTS if each.magic == magic), None)
    if variant is None:
        raise _wrong_magic(path, magic, content)
    if version != variant.version:
        raise DataError(
            f"{path}: version {version} found at byte 4, {variant.version} expected after magic "
            f"{magic}; write it again with llm.c's write_datafile"
        )
    shard = raw_file(path, np.dtype(variant.dtype).newbyteorder("<"), begin=_HEADER.size)
    if shard.num_tokens != num_tokens or num_tokens == 0:
        raise DataError(
            f"{path}: its header says {num_tokens} ids at byte 8, {shard.num_tokens} of "
            f"{variant.dtype} found behind it; it is truncated or damaged: copy it again"
        )
    return shard


def _wrong_magic(path: Path, magic: int, content: bytes) -> DataError:
    known = " or ".join(f"{each.magic} ({each.dtype})" for each in _VARIANTS)
    found = f"{path}: magic {magic} found at byte 0, {known} expected"
    if struct.unpack(">i", content[:4])[0] in [each.magic for each in _VARIANTS]:
        return DataError(f"{found}; it is big-endian: swap its bytes, or write it on a PC")
    if magic == _EVALUATION_MAGIC:
        return DataError(f"{found}; it holds multiple-choice questions: pass a corpus")
    return DataError(f"{found}; it is no shard of llm.c: pass --from nanogpt for ids alone")


class LlmcWriter:
    """Writes OUTPUT/000000.bin, OUTPUT/000001.bin, ... of `shard_tokens` each.

    Raises:
        DataError: the folder exists and `overwrite` is false, or `shard_tokens` is out of range.
    """

    def __init__(self, output: Path, dtype: np.dtype[Any], options: WriteOptions) -> None:
        given = options.shard_tokens
        self._per_shard = SHARD_TOKENS if given is None else given
        if not 0 < self._per_shard <= _MAX_TOKENS:
            raise DataError(
                f"--shard-tokens {self._per_shard} must be in [1, {_MAX_TOKENS}], which the header "
                f"can hold; leave it out for {SHARD_TOKENS}"
            )
        self._variant = next(each for each in _VARIANTS if each.dtype == dtype.name)
        self._folder = PartialFolder(output, options)
        self._file: BinaryIO | None = None
        self._num_shards = self._num_tokens = 0

    def add(self, block: Block) -> None:
        ids = block.ids
        while len(ids):
            if self._num_tokens == 0:
                self._begin_shard()
            count = min(len(ids), self._per_shard - self._num_tokens)
            if self._file is not None:
                begin = self._file.tell()
                self._file.write(bytes_of(ids[:count]))
                start_writing_back(self._file, begin, self._file.tell())
            self._num_tokens += count
            ids = ids[count:]
            if self._num_tokens == self._per_shard:
                self._end_shard()

    @property
    def _name(self) -> str:
        return f"{self._num_shards:06}.bin"

    def _begin_shard(self) -> None:
        """Open the next shard, unless a conversion that was killed completed it."""
        if not self._folder.is_kept(self._name):
            self._file = open(self._folder.path / self._name, "xb")  # noqa: SIM115
            self._file.write(bytes(_HEADER.size))

    def _end_shard(self) -> None:
        if self._file is not None:
            self._file.seek(0)
            magic, version, _ = self._variant
            self._file.write(struct.pack("<3i", magic, version, self._num_tokens))
            self._file.close()
            self._file = None
            self._folder.complete(self._name)
        self._num_shards += 1
        self._num_tokens = 0

    def finish(self, manifest: Manifest) -> None:
        if self._num_tokens:
            self._end_shard()
        self._folder.publish(manifest)

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # a full disk
                self._file.close()
        self._folder.close()
