"""Marks of a conversion, from which the next one of the same inputs and options goes on.

OUTPUT.convert.partial says how much of each partial file is on disk. The input is read again, since
the checksums of a corpus are those of all its ids, and what is on disk is not written again. A
conversion of anything else begins anew.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.files import (
    conversion_marks,
    open_partial,
    partial_path,
    replace_atomically,
    start_writing_back,
    sync_folder,
)

# Bytes between two marks, which a kill loses at most; a mark waits for the disk in a thread.
MARK_BYTES = 256 << 20
_WRITTEN_BACK = 8 << 20  # bytes whose way to the disk begins at once


class Resumption:
    """The marks of a conversion: file name -> bytes of it that are on disk.

    `kept`: those of a killed conversion of the same settings. `may_replace`: it was killed while it
    published its output, so that what is there of it is no other corpus. `is_left`: partial files
    stay when they are closed.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self._path = conversion_marks(output)
        self._settings = json.loads(json.dumps(settings))
        record = self._read()
        self.kept: dict[str, int] = record.get("files", {})
        self.may_replace: bool = record.get("publishing", False)
        self.is_left = self._stopped = False
        self._marks: dict[str, int] = {}
        self._waiting: dict[str, tuple[int, BinaryIO | Path]] = {}
        self._written: dict[str, int] = {}  # as far as `mark` was told
        self._num_bytes = 0  # in `_waiting`
        self._folder: Path | None = None  # of whole files
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    @property
    def num_marked(self) -> int:
        """Bytes that are kept for a later conversion."""
        return sum(self._marks.values())

    def open_stream(self, path: Path) -> BinaryIO:
        """Open the partial file of `path`, which is written from its beginning to its end."""
        partial, kept = partial_path(path), self.kept.get(path.name, 0)
        if not partial.is_file() or partial.stat().st_size < kept:
            kept = 0
        file = open_partial(path, keep=kept)
        if kept:
            self._marks[path.name] = kept
        return StreamFile(file, path.name, kept, self)  # type: ignore[return-value]

    def keeps_file(self, path: Path) -> bool:
        """Whether a file was complete before, of the size that it has."""
        kept = self.kept.get(path.name)
        if kept is None or not path.is_file() or path.stat().st_size != kept:
            return False
        self._marks[path.name] = kept
        return True

    def begin(self) -> None:
        """Forget what is not kept, before anything is written in its place."""
        if not self._marks and not self.may_replace:
            self._path.unlink(missing_ok=True)
        elif self._marks != self.kept:
            self._write(self._record())

    def mark(self, name: str, size: int, file: BinaryIO | Path) -> None:
        """Record, once it is on disk, that `file` has `size` bytes; its buffer is flushed."""
        if self._stopped:
            return
        self._num_bytes += size - self._written.get(name, self._marks.get(name, 0))
        self._written[name] = size
        self._waiting[name] = size, file
        if self._num_bytes >= MARK_BYTES and (self._pending is None or self._pending.done()):
            self.wait()
            waiting, self._waiting, self._num_bytes = self._waiting, {}, 0
            for _, each in waiting.values():
                if not isinstance(each, Path):
                    each.flush()
                else:
                    self._folder = each.parent
            # A file may be closed meanwhile.
            opened = [
                (
                    name,
                    size,
                    os.open(each, os.O_RDONLY) if isinstance(each, Path) else os.dup(each.fileno()),
                )
                for name, (size, each) in waiting.items()
            ]
            self._pending = self._thread.submit(self._sync, opened)

    def stop(self, *, leave: bool) -> None:
        """Record no more, as what is written from here on is not the output. `leave`: partial
        files stay, if any is marked, or others may have their names already."""
        self._stopped = True
        if self._pending is not None:
            self._pending.exception()
        self.is_left = leave and (self.num_marked > 0 or self.may_replace)

    def wait(self) -> None:
        """Wait for the last mark; an error of the disk is raised here."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def publish(self) -> None:
        """Record that names of the output are this conversion's from here on."""
        self.wait()
        self.may_replace = True
        self._write(self._record())

    def take_back(self, path: Path) -> None:
        """Give a whole file of the output its partial name again; the next conversion keeps it."""
        os.replace(path, partial_path(path))
        sync_folder(path.parent)
        self._marks = {path.name: partial_path(path).stat().st_size}
        self._write(self._record())

    def remove(self) -> None:
        """Forget the conversion, which is complete or has failed."""
        if self._pending is not None:
            self._pending.exception()
        for path in (partial_path(self._path), self._path):  # without the last one it is over
            path.unlink(missing_ok=True)

    def _sync(self, opened: list[tuple[str, int, int]]) -> None:
        for name, size, descriptor in opened:
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._marks[name] = size
        if self._folder is not None:
            sync_folder(self._folder)
        self._write(self._record())

    def _record(self) -> dict[str, Any]:
        return {
            "settings": self._settings,
            "files": self._marks,
            "publishing": self.may_replace,
        }

    def _write(self, record: dict[str, Any]) -> None:
        with replace_atomically(self._path) as file:
            file.write(json.dumps(record).encode())

    def _read(self) -> dict[str, Any]:
        try:
            record = json.loads(self._path.read_bytes())
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        if not isinstance(record, dict) or record.get("settings") != self._settings:
            return {}
        files = record.get("files")
        sizes = files.values() if isinstance(files, dict) else [None]
        return record if all(isinstance(size, int) and size >= 0 for size in sizes) else {}


class StreamFile:
    """A file of which the first `kept` bytes are there: written again, they are passed over."""

    def __init__(self, file: BinaryIO, name: str, kept: int, resumption: Resumption) -> None:
        self._file, self._name, self._resumption = file, name, resumption
        self._kept, self._position = kept, 0
        self._written_back = kept

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        begin = max(0, min(self._kept - self._position, len(view)))
        try:
            if begin < len(view):
                self._file.write(view[begin:])
            self._position += len(view)
            if self._position - self._written_back >= _WRITTEN_BACK:
                end = self._position - self._position % mmap.PAGESIZE  # the last page is not full
                start_writing_back(self._file, self._written_back, end)
                self._written_back = end
            if self._position > self._kept:
                self._resumption.mark(self._name, self._position, self._file)
        except BaseException:
            # pyarrow goes on to write, and raises the error at the end.
            self._resumption.stop(leave=False)
            raise
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()

    @property
    def closed(self) -> bool:
        return self._file.closed
