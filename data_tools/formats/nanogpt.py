"""nanoGPT: one .bin of uint16 ids and nothing else.

Its own `prepare.py` scripts append the end token of GPT-2 (50256) to every document, or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.arrays import bytes_of
from data_tools.formats.blocks import (
    Block,
    Boundary,
    ReadOptions,
    Source,
    WriteOptions,
    cut_by_token,
)
from data_tools.formats.manifest import Manifest, read_manifest
from data_tools.formats.raw_files import PartialFiles, RawFile, raw_file

DTYPES = ("uint16",)


def open_nanogpt(paths: Sequence[Path], options: ReadOptions) -> list[Source]:
    """Open .bin files as one stream.

    Raises:
        DataError: a file is missing, empty or holds half an id.
    """
    dtype = np.dtype(options.dtype or "uint16").newbyteorder("<")
    files = [raw_file(path, dtype) for path in paths]
    recorded = read_manifest(paths[0].with_suffix(""), kind="nanogpt") if len(paths) == 1 else None
    return [
        Source(
            name=str(paths[0]),
            dtype=dtype,
            num_bytes=sum(file.num_tokens for file in files) * dtype.itemsize,
            paths=paths,
            blocks=partial(stream_blocks, files),
            recorded=recorded,
        )
    ]


def stream_blocks(files: Sequence[RawFile], boundary: Boundary) -> Iterator[Block]:
    """Yield the ids of files that are one stream, cut into documents by a token."""
    parts = ((ids, offset, file.path) for file in files for ids, offset in file.parts())
    return cut_by_token(parts, boundary)


class NanoGptWriter:
    """Writes OUTPUT.bin.

    Raises:
        DataError: it exists and `overwrite` is false.
    """

    def __init__(self, output: Path, dtype: np.dtype[Any], options: WriteOptions) -> None:
        path = output.with_name(output.name + ".bin")
        self._files = PartialFiles(output, [path], options)

    def add(self, block: Block) -> None:
        self._files[0].write(bytes_of(block.ids))

    def finish(self, manifest: Manifest) -> None:
        self._files.publish(manifest)

    def close(self) -> None:
        self._files.close()
