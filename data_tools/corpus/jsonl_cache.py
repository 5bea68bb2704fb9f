"""Cache file with the plain text of .jsonl files, memory-mapped by all ranks and later runs.

uint8 [tokens]      UTF-8 text of every document, each followed by 255, which UTF-8 never contains
uint8               zero padding to a multiple of 8
int64 [documents]   end offsets of the documents in the first part, including the 255
int64               number of documents
uint8 [32]          SHA-256 of everything before it
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np

from data_tools.arrays import IntArray, TokenArray, bisect_right
from data_tools.corpus.byte_dataset import MappedFiles, starts_between
from data_tools.corpus.jsonl_stream import JsonlStream, lines_of, no_text_error
from data_tools.corpus.remote import default_cache_dir
from data_tools.corpus.token_stream import DocumentOrigin, Span, TokenStream
from data_tools.errors import DataError
from data_tools.files import flush_to_disk, lock_folder, map_file
from data_tools.tokenization.byte_vocabulary import BYTE_EOD

logger = logging.getLogger(__name__)

_VERSION = 2  # of the layout above
_NAME = "text"
_END = b"\xff"
_WORD = 8  # bytes of an int64
_DIGEST = 32  # bytes of a SHA-256
_READ_BYTES = 1 << 20  # block size of reads
_REQUIRED_FREE_SPACE = 2  # times the size of the files, so that a cache cannot fill the disk


class JsonlCache:
    """The tokens of `JsonlStream`, read from a cache file without parsing."""

    document_end = eod_id = BYTE_EOD
    bos_ids = ()
    is_bytes = True

    def __init__(self, path: Path, *, files: MappedFiles, json_key: str) -> None:
        data = np.frombuffer(map_file(path), dtype=np.uint8)[:-_DIGEST]
        words = data[len(data) % _WORD :].view("<i8")
        num_documents = int(words[-1]) if len(words) > 1 else 0
        if not 0 < num_documents < len(words) or len(data) % _WORD:
            raise _damaged(path)
        self._ends = words[-1 - num_documents : -1]
        num_bytes = int(self._ends[-1])
        if num_bytes + -num_bytes % _WORD + _WORD * (num_documents + 1) != len(data):
            raise _damaged(path)
        self._bytes = data[:num_bytes]
        self.fingerprint = f"{files.fingerprint}-jsonl-{json_key}"
        self._files, self._json_key = files, json_key

    @property
    def num_tokens(self) -> int:
        return len(self._bytes)

    @property
    def num_bytes(self) -> int:
        return len(self._bytes) - len(self._ends)

    def read(self, starts: IntArray, length: int) -> TokenArray:
        found = np.empty((len(starts), length), dtype=np.uint8)
        for row, start in zip(found, starts.tolist(), strict=True):
            row[:] = self._bytes[start : start + length]
        return np.add(found, found == _END[0], dtype=np.uint16)  # 255 becomes BYTE_EOD

    def document_starts(self, begins: IntArray, length: int) -> list[IntArray]:
        return [starts_between(self._ends, begin, length) for begin in begins.tolist()]

    def document_at(self, position: int) -> Span:
        index = int(bisect_right(self._ends, np.array([position]))[0])
        return Span(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))

    def origin_at(self, position: int) -> DocumentOrigin:
        index = int(bisect_right(self._ends, np.array([position]))[0])
        file, line = self._lines[index].tolist()
        return DocumentOrigin(index, str(self._files.paths[file]), line)

    @cached_property
    def _lines(self) -> IntArray:
        """File and line of every document, [documents, 2]: parses the files once more."""
        found = [
            (number, line.number)
            for number, path in enumerate(self._files.paths)
            for line in lines_of(path, self._json_key)
        ]
        return np.array(found, dtype=np.int64)


def verify_caches(cache_dir: str | None) -> Iterator[Path]:
    """Verify the checksum of every .jsonl cache file, and yield the path of each.

    Raises:
        DataError: a file is damaged.
    """
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    for path in sorted(folder.glob(f"*/{_NAME}")):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256()
            while (left := size - _DIGEST - file.tell()) > 0:
                digest.update(file.read(min(left, _READ_BYTES)))
            if digest.digest() != file.read():
                raise _damaged(path)
        yield path


def _damaged(path: Path) -> DataError:
    return DataError(f"{path}: the cached text is damaged; delete it to rebuild it")


def open_jsonl(files: MappedFiles, *, json_key: str, cache_dir: str | None) -> TokenStream:
    """Open the cached text of files, built by the first process of a machine that needs it.

    If no cache can be written, fall back to parsing lines on every read.

    Raises:
        DataError: a line is not an object with text under `json_key`, or no line has any.
    """
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    try:
        path = _find_or_build(files, json_key, folder)
    except OSError as error:
        logger.warning(
            "%s: %s; lines are parsed on every read, which is slower: set data.cache_dir",
            folder,
            error.strerror or error,
        )
        return JsonlStream(files, json_key=json_key)
    return JsonlCache(path, files=files, json_key=json_key)


def _find_or_build(files: MappedFiles, json_key: str, folder: Path) -> Path:
    key = _key(files, json_key)
    path = folder / key / _NAME
    with lock_folder(folder / key):
        if path.exists():
            return path
        needed = _REQUIRED_FREE_SPACE * int(files.sizes.sum())
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, f"less than {needed / 1e9:.1f} GB free")
        # Not `replace_atomically`: on a file system without locks each machine writes its own.
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                _write(files, json_key, file)
                flush_to_disk(file)
                if _key(files, json_key) != key:
                    raise DataError(
                        f"{files.paths[0]} or a file beside it changed while it was read; do "
                        "not change files that are in use"
                    )
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    return path


def _key(files: MappedFiles, json_key: str) -> str:
    """Return the cache key: a hash of paths, inodes, sizes and times of the files."""
    stats = [(os.path.abspath(path), os.stat(path)) for path in files.paths]
    identity = [(path, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return hashlib.sha256(repr((_VERSION, json_key, identity)).encode()).hexdigest()[:32]


def _write(files: MappedFiles, json_key: str, file: IO[bytes]) -> None:
    ends, end = array("q"), 0
    digest = hashlib.sha256()

    def write(data: bytes) -> None:
        file.write(data)
        digest.update(data)

    for path in files.paths:
        for line in lines_of(path, json_key):
            write(line.text + _END)
            end += len(line.text) + 1
            ends.append(end)
    if not ends:
        raise no_text_error(files, json_key)
    write(bytes(-end % _WORD))
    write(np.array([*ends, len(ends)], dtype="<i8").tobytes())
    file.write(digest.digest())
