"""Durable, all-or-nothing output files."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from data_tools.errors import DataError

PARTIAL_SUFFIX = ".partial"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def partial_path(path: Path) -> Path:
    """The name under which `path` is written until it is complete."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def open_partial(path: Path) -> BinaryIO:
    """Open the partial file of `path` for this process alone.

    Raises:
        DataError: another process is writing the same output, or the folder cannot be written.
    """
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(partial, "ab")  # noqa: SIM115 - append: do not empty what another process writes
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror}; choose a folder you can write to"
        ) from error
    if not _lock(file, partial):
        file.close()
        raise DataError(
            f"{partial} is being written by another process; wait for it or choose another output"
        )
    file.truncate(0)  # what a killed writer left behind
    return file


def _lock(file: BinaryIO, partial: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Published between our open and our lock, the name would now be another's file.
        return os.path.samestat(os.fstat(file.fileno()), os.stat(partial))
    except OSError:
        return False


def flush_to_disk(file: IO[bytes]) -> None:
    """Make the contents of an open file survive a power loss."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replace_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of `path` only when the block succeeds."""
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
def locked(folder: Path) -> Iterator[None]:
    """The ranks of a machine fill a folder one after the other: the first does, the others find it.

    The folder is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
