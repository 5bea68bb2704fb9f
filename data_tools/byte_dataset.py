"""Raw files as a token stream: no tokenizer, nothing to preprocess."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.errors import DataError
from data_tools.indexed import map_file
from data_tools.permutation import IntArray, TokenArray

BYTE_EOD = 256
BYTE_VOCAB_SIZE = 257  # 256 byte values and the end of a document; a model may have more
_OPEN_FILES = 128  # mappings kept: each holds a file descriptor
_FINGERPRINT_FILES = 256
_FINGERPRINT_BYTES = 4096


class ByteStream:
    """The bytes of files, in sorted order, each file one document that ends with id 256.

    Empty files are left out. Files are mapped when first read; only their sizes are kept.

    Raises:
        DataError: no file, or none with a byte in it.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        sizes = [_size(file) for file in files]
        self.files = [file for file, size in zip(files, sizes, strict=True) if size > 0]
        if not self.files:
            raise DataError(
                f"the {len(files)} files of a byte source hold no byte; "
                "check data.train and data.validation"
            )
        self._sizes = np.array([size for size in sizes if size > 0], dtype=np.int64)
        self._ends = np.cumsum(self._sizes + 1)  # each document is its bytes and one end token
        self._map = lru_cache(maxsize=_OPEN_FILES)(self._map_checked)

    @property
    def num_tokens(self) -> int:
        return int(self._ends[-1])

    @property
    def num_bytes(self) -> int:
        return int(self._sizes.sum())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, sizes and the first 4 KiB of 256 files spread over the list."""
        folder = os.path.commonpath([os.path.abspath(file.parent) for file in self.files])
        digest = hashlib.sha256()
        for file, size in zip(self.files, self._sizes, strict=True):
            digest.update(f"{os.path.relpath(file, folder)}\0{size}\0".encode())
        spread = np.linspace(0, len(self.files) - 1, _FINGERPRINT_FILES).astype(np.int64)
        for index in np.unique(spread):
            digest.update(self._map(int(index))[:_FINGERPRINT_BYTES].tobytes())
        return digest.hexdigest()

    def read(self, starts: IntArray, length: int) -> TokenArray:
        ids = np.empty((len(starts), length), dtype=np.uint16)
        first_files = np.searchsorted(self._ends, starts, side="right")
        for row, start, file in zip(ids, starts.tolist(), first_files.tolist(), strict=True):
            self._read_span(row, start, file)
        return ids

    def document_starts(self, begins: IntArray, length: int) -> list[IntArray]:
        firsts = np.searchsorted(self._ends, begins, side="right").tolist()
        lasts = np.searchsorted(self._ends, begins + length - 1, side="right").tolist()
        return [self._ends[first:last] for first, last in zip(firsts, lasts, strict=True)]

    def _read_span(self, out: TokenArray, start: int, file: int) -> None:
        filled = 0
        while filled < len(out):
            size = int(self._sizes[file])
            begin = start + filled - (int(self._ends[file]) - size - 1)
            piece = self._map(file)[begin : begin + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            if filled < len(out):
                out[filled] = BYTE_EOD
                filled += 1
            file += 1

    def _map_checked(self, index: int) -> npt.NDArray[np.uint8]:
        data = np.frombuffer(map_file(self.files[index]), dtype=np.uint8)
        if len(data) != self._sizes[index]:
            raise DataError(
                f"{self.files[index]}: {len(data)} bytes found, {self._sizes[index]} when the run "
                "started; do not change files that are in use"
            )
        return data


def expand_paths(pattern: str, *, suffixes: tuple[str, ...] = ()) -> list[Path]:
    """Files of a path, a directory (recursively, no hidden files) or a glob, sorted.

    `suffixes` limits what is taken from directories.

    Raises:
        DataError: there is no such file.
    """
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [
            file
            for file in path.rglob("*")
            if file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
            and (not suffixes or file.name.endswith(suffixes))
        ]
    else:
        files = [Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
    if not files:
        wanted = f" with {', '.join(suffixes)}" if suffixes and path.is_dir() else ""
        raise DataError(f"{pattern}: no such file, or nothing in it{wanted}; check the path")
    return sorted(files)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; check the path") from error
