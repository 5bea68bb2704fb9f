"""File helpers: atomic durable writes, memory-mapped input, path expansion."""

from __future__ import annotations

import ctypes
import fcntl
import glob
import hashlib
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

import xxhash

from data_tools.errors import DataError, NoSuchFileError, cwd_hint

PARTIAL_SUFFIX = ".partial"
_SYNC_FILE_RANGE_WRITE = 2  # of Linux: begins to write, and waits for nothing
_HASHED_APART = 1 << 18  # bytes from which on a second thread is worth its start


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Digest:
    """Checksum of blocks; SHA-256, which takes as long as writing them, is computed meanwhile."""

    def __init__(self, algorithm: Literal["sha256", "xxh3_128"] = "sha256") -> None:
        self._digest = hashlib.sha256() if algorithm == "sha256" else xxhash.xxh3_128()
        self._is_slow = algorithm == "sha256"  # XXH3 is faster than a change of threads
        self._thread = ThreadPoolExecutor(1)  # started by the first large block
        self._pending: Future[None] | None = None

    def update(self, data: memoryview | bytes) -> None:
        """Hash `data`, which must not change before `wait` or the next call."""
        self.wait()
        if not self._is_slow or len(data) < _HASHED_APART:
            self._digest.update(data)
        else:
            self._pending = self._thread.submit(self._digest.update, data)

    def wait(self) -> None:
        """Wait until all that was given is hashed."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def hexdigest(self) -> str:
        self.wait()
        return self._digest.hexdigest()


def partial_path(path: Path) -> Path:
    """Return the temporary name under which `path` is written until it is complete."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def conversion_marks(output: Path) -> Path:
    """Return the file of a killed conversion to `output`: how much of its partial files is kept.

    Another writer of the same partial files removes it.
    """
    return output.with_name(output.name + ".convert" + PARTIAL_SUFFIX)


def open_partial(path: Path, *, keep: int = 0) -> BinaryIO:
    """Open the partial file of `path` under an exclusive lock, to be written after `keep` bytes.

    Raises:
        DataError: another process is writing the same output, or the folder is not writable.
    """
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(partial, "ab")  # noqa: SIM115 - append: must not truncate another's output
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror}; choose a folder you can write to"
        ) from error
    if not _lock(file, partial):
        file.close()
        raise DataError(
            f"{partial} is being written by another process; wait for it or choose another output"
        )
    file.truncate(keep)  # what a killed writer left behind
    return file


def _lock(file: BinaryIO, partial: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # If the file was published between our open and our lock, the name is now another file.
        return os.path.samestat(os.fstat(file.fileno()), os.stat(partial))
    except OSError:
        return False


def start_writing_back(file: IO[bytes], begin: int, end: int) -> None:
    """Let the system write [begin, end) of a file to the disk, without waiting for it.

    It would leave that to the `fsync` at the end, and the disk idle until then. An error of the
    disk is that of the `fsync`. A system without the call leaves it all to that.
    """
    call = _sync_file_range()
    if call is not None:
        call(file.fileno(), begin, end - begin, _SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    # Python lacks it. `os.posix_fadvise` begins to write as well, but waits for all cores to empty
    # their lists of pages.
    call: Any = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


def flush_to_disk(file: IO[bytes]) -> None:
    """Flush an open file so that its contents survive a power loss."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder so that its directory entries survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replace_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` only if the block succeeds."""
    file = open_partial(path)
    partial = partial_path(path)
    try:
        with file:
            yield file
            flush_to_disk(file)
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on `folder`, created if missing.

    The first rank of a machine to get the lock fills the folder; the others find it filled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def map_file(path: Path) -> mmap.mmap:
    """Memory-map a whole file read-only, without read-ahead: windows are read in random order.

    Raises:
        DataError: the file is missing, unreadable or empty.
    """
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise NoSuchFileError(
                f"{path} links to {os.readlink(path)}, a file expected there, none found; move it "
                "back, or make the link again"
            ) from error
        raise NoSuchFileError(
            f"{path}: no such file{cwd_hint(path)}; check the path or preprocess it first"
        ) from error
    except ValueError as error:  # mmap raises it for an empty file
        raise DataError(f"{path}: the file is empty; preprocess the corpus again") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; check the path and its permissions") from error
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return mapped


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name.endswith(PARTIAL_SUFFIX)


def expand_paths(pattern: str, *, suffixes: tuple[str, ...] = ()) -> list[Path]:
    """Return the sorted files of a path, a directory (recursive) or a glob.

    In directories hidden files and what is not yet completely written are left out.

    Args:
        suffixes: Suffixes of the files to take from directories; empty: all.

    Raises:
        DataError: no file matches.
    """
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [
            file
            for file in path.rglob("*")
            if file.is_file()
            and not any(map(_is_left_out, file.relative_to(path).parts))
            and (not suffixes or file.name.endswith(suffixes))
        ]
    else:
        files = [Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
    if not files:
        wanted = f" with {', '.join(suffixes)}" if suffixes and path.is_dir() else ""
        raise NoSuchFileError(
            f"{pattern}: no such file, or nothing in it{wanted}{cwd_hint(pattern)}; check the path"
        )
    return sorted(files)
