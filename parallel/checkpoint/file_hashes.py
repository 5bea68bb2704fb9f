"""SHA-256 of many files at a time.

One file is hashed by one core, since every block depends on the one before: 0.5 to 2 GB/s. So a
model of 70B in one file takes 70 to 280 seconds, and in files of 4 GB as much less as there are
cores; checkpoints of runs, imports and exports are in many. hashlib releases the GIL.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from pathlib import Path
from typing import NamedTuple

from parallel.checkpoint.storage import FileRecord, file_record
from parallel.cpu.side_by_side import side_by_side
from parallel.cpu.threads import usable_cpus

_MAX_THREADS = 8  # a file system has its limit, too


class HashedFile(NamedTuple):
    """A file, and its size and checksum, or the error on the way to them."""

    path: Path
    record: FileRecord | None
    error: OSError | None = None


def hash_files(paths: Iterable[Path], *, threads: int | None = None) -> Generator[HashedFile]:
    """Hash files in the order given, up to `threads` at a time: by default one per core.

    `paths` is read in the calling thread, each path when its file is begun. Whoever stops reading
    waits for the files that have been begun.
    """
    threads = threads or min(_MAX_THREADS, len(usable_cpus()))
    return side_by_side(_hash, paths, threads=threads)


def _hash(path: Path) -> HashedFile:
    try:
        return HashedFile(path, file_record(path))
    except OSError as error:
        return HashedFile(path, None, error)
