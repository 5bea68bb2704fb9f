"""The text of .jsonl files without JSON around it, kept in a file that later runs map.

uint8 [tokens]      UTF-8 text of every document, each followed by 255, which UTF-8 never has
uint8               zeros up to a multiple of 8
int64 [documents]   where documents end in the first part, the 255 included
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
from pathlib import Path
from typing import IO

import numpy as np

from data_tools.arrays import IntArray, TokenArray, bisect_right
from data_tools.corpus.byte_dataset import MappedFiles, starts_between
from data_tools.corpus.jsonl_stream import JsonlStream, lines_of, no_text
from data_tools.corpus.remote import default_cache_dir
from data_tools.corpus.token_stream import Span, TokenStream
from data_tools.errors import DataError
from data_tools.files import flush_to_disk, locked, map_file
from data_tools.tokenization.byte_vocabulary import BYTE_EOD

logger = logging.getLogger(__name__)

_VERSION = 2  # of the layout above
_NAME = "text"
_END = b"\xff"
_WORD = 8  # bytes of an int64
_DIGEST = 32  # bytes of a SHA-256
_READ = 1 << 20  # bytes read at once
_NEEDED_SPACE = 2  # times the size of the files: an image must not fill a disk


class JsonlImage:
    """The tokens of `JsonlStream`, read from the image of its files: nothing is parsed."""

    document_end = eod_id = BYTE_EOD
    bos_ids = ()

    def __init__(self, image: Path, *, fingerprint: str) -> None:
        data = np.frombuffer(map_file(image), dtype=np.uint8)[:-_DIGEST]
        words = data[len(data) % _WORD :].view("<i8")
        num_documents = int(words[-1]) if len(words) > 1 else 0
        if not 0 < num_documents < len(words) or len(data) % _WORD:
            raise _damaged(image)
        self._ends = words[-1 - num_documents : -1]
        num_bytes = int(self._ends[-1])
        if num_bytes + -num_bytes % _WORD + _WORD * (num_documents + 1) != len(data):
            raise _damaged(image)
        self._bytes = data[:num_bytes]
        self.fingerprint = fingerprint

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

    def document_at(self, place: int) -> Span:
        index = int(bisect_right(self._ends, np.array([place]))[0])
        return Span(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))


def verify_images(cache_dir: str | None) -> Iterator[Path]:
    """Read every image of a cache; yields those that are as they were written.

    Raises:
        DataError: the first one that is damaged.
    """
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    for image in sorted(folder.glob(f"*/{_NAME}")):
        with open(image, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256()
            while (left := size - _DIGEST - file.tell()) > 0:
                digest.update(file.read(min(left, _READ)))
            if digest.digest() != file.read():
                raise _damaged(image)
        yield image


def _damaged(image: Path) -> DataError:
    return DataError(f"{image}: the cached text is damaged; delete it, and it is made again")


def open_jsonl(files: MappedFiles, *, json_key: str, cache_dir: str | None) -> TokenStream:
    """The image of the files, made by the first of a machine's processes that needs it.

    Where none can be kept, lines are parsed whenever they are read.

    Raises:
        DataError: a line is not an object with a text under `json_key`, or there is no text.
    """
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    try:
        image = _find_or_make(files, json_key, folder)
    except OSError as error:
        logger.warning(
            "%s: %s; lines are parsed whenever they are read, which is slower: set data.cache_dir",
            folder,
            error.strerror or error,
        )
        return JsonlStream(files, json_key=json_key)
    return JsonlImage(image, fingerprint=f"{files.fingerprint}-jsonl-{json_key}")


def _find_or_make(files: MappedFiles, json_key: str, folder: Path) -> Path:
    key = _key(files, json_key)
    image = folder / key / _NAME
    with locked(folder / key):
        if image.exists():
            return image
        needed = _NEEDED_SPACE * int(files.sizes.sum())
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, f"less than {needed / 1e9:.1f} GB free")
        # Not `replace_atomically`: where a file system does not lock, each machine writes its own.
        with tempfile.NamedTemporaryFile(dir=image.parent, delete=False) as file:
            try:
                _write(files, json_key, file)
                flush_to_disk(file)
                if _key(files, json_key) != key:
                    raise DataError(
                        f"{files.paths[0]} or a file beside it has changed while it was read; do "
                        "not change files that are in use"
                    )
                os.replace(file.name, image)
            except BaseException:
                os.unlink(file.name)
                raise
    return image


def _key(files: MappedFiles, json_key: str) -> str:
    """Names an image after the files, as they are now, that it is made of."""
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
        raise no_text(files, json_key)
    write(bytes(-end % _WORD))
    write(np.array([*ends, len(ends)], dtype="<i8").tobytes())
    file.write(digest.digest())
