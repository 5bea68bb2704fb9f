"""File operations of a checkpoint save, each of them a named fault-injection point."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

Hook = Callable[[str, Path], None]
FAULT_VARIABLE = "MANYFORMER_FAULT"
FAULT_SWITCH = "MANYFORMER_FAULT_TESTS"


class FileRecord(NamedTuple):
    """Size in bytes and hexadecimal sha256 of a file."""

    size: int
    sha256: str


class Storage:
    """File operations of a save; a save touches the disk through this class alone.

    Args:
        hook: called as `hook(operation, path)` right before every operation; for fault tests.
    """

    def __init__(self, *, hook: Hook | None = None) -> None:
        self._hook = hook

    def point(self, operation: str, path: Path) -> None:
        if self._hook is not None:
            self._hook(operation, path)

    def make_directory(self, path: Path) -> None:
        self.point("mkdir", path)
        path.mkdir()

    @contextmanager
    def create(self, path: Path) -> Iterator[BinaryIO]:
        """Open a new file, which is synced to disk (fsync) when the block ends."""
        self.point("open", path)
        try:
            with path.open("xb") as file:
                yield cast(BinaryIO, _HookedFile(file, self, path))
                self.point("fsync", path)
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = error.filename or str(path)  # write() does not say where
            raise

    def write(self, path: Path, data: bytes) -> None:
        with self.create(path) as file:
            half = len(data) // 2  # two writes, so that a fault can tear the file
            file.write(data[:half])
            file.write(data[half:])

    def replace_file(self, path: Path, data: bytes) -> None:
        """Replace `path` atomically: a reader sees either the old or the new content."""
        temporary = path.with_name(f".{path.name}-{os.urandom(4).hex()}")
        self.write(temporary, data)
        self.rename(temporary, path)

    def sync(self, path: Path) -> None:
        """Flush a file or directory to disk; a rename is durable once its directory is."""
        self.point("fsync", path)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        self.point("rename", new)
        old.replace(new)

    def unlink(self, path: Path) -> None:
        self.point("unlink", path)
        path.unlink()

    def remove_tree(self, path: Path) -> None:
        self.point("rmtree", path)
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        for entry in sorted(path.iterdir()):
            self.point("unlink", entry)
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        path.rmdir()

    def record(self, path: Path) -> FileRecord:
        """Read a file back and return its size and checksum."""
        self.point("hash", path)
        return file_record(path)


def file_record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(size=file.tell(), sha256=digest)


class _HookedFile:
    def __init__(self, file: BinaryIO, storage: Storage, path: Path) -> None:
        self._file, self._storage, self._path = file, storage, path

    def write(self, data: object) -> int:
        self._storage.point("write", self._path)
        written = self._file.write(data)  # type: ignore[call-overload]
        self._file.flush()
        return int(written)


def fault_hook(environment: Mapping[str, str], rank: int) -> Hook | None:
    """A hook that injects one fault, described as `rename#2@rank1:kill`; None without one.

    `MANYFORMER_FAULT` holds the description: operation (or `any`), how many of them to let pass,
    rank, and the fault: `kill` (SIGKILL), `eio` or `enospc` (OSError). It has no effect unless
    `MANYFORMER_FAULT_TESTS=1`.

    Raises:
        ValueError: the description cannot be parsed.
    """
    text = environment.get(FAULT_VARIABLE)
    if text is None or environment.get(FAULT_SWITCH) != "1":
        return None
    match = re.fullmatch(r"([a-z]+)#(\d+)@rank(\d+):(kill|eio|enospc)", text)
    if match is None:
        raise ValueError(f"{FAULT_VARIABLE}={text!r} must look like 'rename#2@rank1:kill'")
    operation, remaining, fault_rank, action = match[1], int(match[2]), int(match[3]), match[4]

    def hook(name: str, path: Path) -> None:
        nonlocal remaining
        if rank != fault_rank or operation not in (name, "any"):
            return
        remaining -= 1
        if remaining >= 0:
            return
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        code = errno.EIO if action == "eio" else errno.ENOSPC
        raise OSError(code, os.strerror(code), str(path))

    return hook
