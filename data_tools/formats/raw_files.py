"""Files of ids read in blocks, and outputs under partial names until they are complete."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_tools.arrays import TokenArray, bytes_of
from data_tools.errors import DataError, NoSuchFileError, cwd_hint
from data_tools.files import (
    PARTIAL_SUFFIX,
    expand_paths,
    flush_to_disk,
    open_partial,
    partial_path,
    start_writing_back,
    sync_folder,
)
from data_tools.formats.blocks import BLOCK_BYTES, WriteOptions
from data_tools.formats.manifest import Manifest, manifest_path

# Older names of the Hugging Face hub end in a hash.
_NUMBERED = re.compile(r"(?P<stem>.*?)(?P<number>\d+)(-of-(?P<total>\d+)(-[0-9a-f]+)?)?\.\w+")


class RawFile(NamedTuple):
    """Ids in [begin, size of the file) of a file."""

    path: Path
    dtype: np.dtype[Any]
    begin: int
    num_tokens: int

    def parts(self) -> Iterator[tuple[TokenArray, int]]:
        """Yield the ids in blocks, each with the byte where it begins.

        Raises:
            DataError: the file has become shorter since it was opened.
        """
        per_block = BLOCK_BYTES // self.dtype.itemsize
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.begin)
            for first in range(0, self.num_tokens, per_block):
                ids = np.empty(min(per_block, self.num_tokens - first), self.dtype)
                offset = self.begin + first * self.dtype.itemsize
                _fill(file, ids, self.path, offset)
                yield ids, offset


def _fill(file: Any, ids: TokenArray, path: Path, offset: int) -> None:
    view = bytes_of(ids)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise DataError(
                f"{path}: it ends at byte {offset + done}, {len(view) - done} bytes too early; it "
                "was cut while it was read: wait until it is written"
            )
        done += count


def file_size(path: Path, *, remedy: str = "check the path") -> int:
    """Return the size of a file that must not be empty.

    Raises:
        DataError: it is missing, no file or empty.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise NoSuchFileError(f"{path}: no such file{cwd_hint(path)}; {remedy}") from error
    if path.is_dir():
        raise DataError(f"{path}: it is a folder, a file expected; pass the files in it")
    if size == 0:
        raise DataError(f"{path}: 0 bytes found; it holds no ids: write it again")
    return size


def raw_file(path: Path, dtype: np.dtype[Any], *, begin: int = 0) -> RawFile:
    """Open a file that holds ids from `begin` on.

    Raises:
        DataError: it is missing or empty, or its size is no multiple of the dtype's.
    """
    size = file_size(path)
    if (size - begin) % dtype.itemsize:
        raise DataError(
            f"{path}: {size} bytes found, which are not whole ids of {dtype.itemsize} bytes "
            f"({dtype.name}) from byte {begin} on; it is truncated or of another dtype: copy it "
            "again or pass --dtype"
        )
    return RawFile(path, dtype, begin, (size - begin) // dtype.itemsize)


class PartialFiles:
    """The files of one output and its manifest, under partial names until `publish`.

    The last one is renamed last and, if it exists, removed first: an output that has it is
    complete. It is written from its beginning to its end, so that a conversion that was killed goes
    on in it.

    Raises:
        DataError: one exists and is not to be replaced, or another process is writing it.
    """

    def __init__(self, output: Path, paths: Sequence[Path], options: WriteOptions) -> None:
        self._options = options
        self._paths = [manifest_path(output), *paths]
        _check_absent(self._paths, overwrite=options.may_replace)
        for path in paths:
            if path.is_dir():
                raise DataError(
                    f"{path}: it is a folder, which a file of the output cannot replace; choose "
                    "another --output"
                )
        self._files: list[BinaryIO] = []
        try:
            # The last one first: its lock protects the others.
            self._files.append(options.open_stream(self._paths[-1]))
            for path in reversed(self._paths[:-1]):
                self._files.insert(0, open_partial(path))
        except BaseException:
            self.close()
            raise

    def __getitem__(self, index: int) -> BinaryIO:
        """Return the open file of the path at `index`."""
        return self._files[1:][index]

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest, and rename all files to their own names."""
        self._files[0].write(manifest.to_bytes())
        for file in self._files:
            flush_to_disk(file)
        self._paths[-1].unlink(missing_ok=True)
        for path in self._paths:
            os.replace(partial_path(path), path)
        sync_folder(self._paths[-1].parent)
        self.close()

    def close(self) -> None:
        """Remove what is not published."""
        for file, path in zip(reversed(self._files), reversed(self._paths), strict=False):
            with suppress(OSError):  # a full disk
                file.close()
            if not self._options.is_left:
                partial_path(path).unlink(missing_ok=True)
        self._files = []


class PartialFolder:
    """A folder of files, under a partial name until `publish` renames it as a whole.

    Files that a killed conversion completed stay in it.

    Raises:
        DataError: it exists and is not to be replaced, or another process is writing it.
    """

    def __init__(self, output: Path, options: WriteOptions) -> None:
        self._options = options
        self._output, self._manifest_path = output, manifest_path(output)
        self.path = partial_path(output)
        self._replaced = partial_path(output.with_name(output.name + ".replaced"))
        _check_absent([output, self._manifest_path], overwrite=options.may_replace)
        if output.is_dir() and not self._manifest_path.exists() and any(output.iterdir()):
            raise DataError(
                f"{output}: it has no {self._manifest_path.name} beside it, so that no conversion "
                "wrote it, and --overwrite does not delete it; choose another --output, or delete "
                "it yourself"
            )
        # Its lock protects the folder as well, and files of the same prefix in other formats.
        self._manifest = open_partial(self._manifest_path)
        try:
            self._remove_leftovers()
        except BaseException:
            self.close()
            raise

    def _remove_leftovers(self) -> None:
        """Remove what a killed writer left, but for files that are kept."""
        _remove(self._replaced)
        resumption = self._options.resumption
        if resumption is None or not resumption.kept or self.path.is_symlink():
            _remove(self.path)
        self.path.mkdir(exist_ok=True)
        for path in self.path.iterdir():
            is_stream = path.name.endswith(PARTIAL_SUFFIX)  # which `open_stream` keeps or empties
            if resumption is not None and not is_stream and not resumption.keeps_file(path):
                _remove(path)

    def is_kept(self, name: str) -> bool:
        """Whether a file was completed by a conversion that was killed."""
        return (self.path / name).exists()

    def complete(self, name: str) -> None:
        """A file is complete, and closed."""
        path = self.path / name
        with open(path, "rb") as file:
            start_writing_back(file, 0, path.stat().st_size)
        if self._options.resumption is not None:
            self._options.resumption.mark(name, path.stat().st_size, path)

    def open_stream(self, name: str) -> BinaryIO:
        """Open a file that is written from its beginning to its end, until `end_stream`."""
        return self._options.open_stream(self.path / name)

    def end_stream(self, name: str, file: BinaryIO) -> None:
        """Close a stream, which gets its own name."""
        flush_to_disk(file)
        os.replace(partial_path(self.path / name), self.path / name)
        file.close()

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest beside the folder, and rename the folder to its own name."""
        for path in self.path.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(self.path)
        self._manifest.write(manifest.to_bytes())
        flush_to_disk(self._manifest)
        # Moved and not deleted: a folder without some of its shards must not have that name.
        if os.path.lexists(self._output):
            os.rename(self._output, self._replaced)
        os.replace(partial_path(self._manifest_path), self._manifest_path)
        os.rename(self.path, self._output)
        sync_folder(self._output.parent)
        _remove(self._replaced)
        self.close()

    def close(self) -> None:
        """Remove what is not published."""
        if not self._manifest.closed:
            if not self._options.is_left:
                shutil.rmtree(self.path, ignore_errors=True)
                partial_path(self._manifest_path).unlink(missing_ok=True)
            with suppress(OSError):  # a full disk
                self._manifest.close()


def _check_absent(paths: Sequence[Path], *, overwrite: bool) -> None:
    existing = [path for path in paths if os.path.lexists(path)]
    if existing and not overwrite:
        raise DataError(
            f"{existing[0]} exists; choose another --output or pass --overwrite to replace it"
        )


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_index(folder: Path, *, of: str) -> dict[str, Any]:
    """Read the index.json of a folder of shards.

    Raises:
        DataError: it is missing, so that the folder is incomplete, or no JSON object.
    """
    path = folder / "index.json"
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise NoSuchFileError(
            f"{path}: no such file{cwd_hint(path)}; it lists the shards of {of}: pass the folder "
            "that holds both"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}; it is damaged: copy it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: {type(content).__name__} found, dict expected; copy it again")
    return content


def listed_file(folder: Path, name: object, *, index: str) -> Path:
    """Return the path of a file that an index lists, which must lie in the folder of the index.

    Raises:
        DataError: it does not.
    """
    path = folder / str(name)
    is_name = isinstance(name, str) and "\0" not in name
    if not is_name or not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            f"{folder / index}: file {name!r} is listed, which is not in {folder}; copy all files "
            "into one folder"
        )
    return path


def numbered_files(path: Path, suffix: str, *, is_stream: bool = False) -> list[Path]:
    """Return the files of a path, of which none may lack in a folder by their numbers.

    `is_stream`: a text goes on in the next file, so that numbers follow each other; else only
    names such as `train-00000-of-00005.parquet` say how many there are.

    Raises:
        DataError: there are none, or one lacks.
    """
    files = expand_paths(str(path), suffixes=(suffix,))
    numbers: dict[tuple[str, str, str], dict[int, str]] = {}
    for file in files if path.is_dir() else []:
        found = _NUMBERED.fullmatch(file.name)
        if found and (is_stream or found["total"]):
            key = (str(file.parent), found["stem"], found["total"] or "")
            numbers.setdefault(key, {})[int(found["number"])] = found["number"]
    for (folder, stem, total), by_number in numbers.items():
        first, last = (0, int(total) - 1) if total else (min(by_number), max(by_number))
        lacking = next((n for n in range(first, last + 1) if n not in by_number), None)
        if lacking is not None:
            width = len(next(iter(by_number.values())))
            name = f"{stem}{lacking:0{width}}{f'-of-{total}' if total else ''}"
            raise DataError(
                f"{folder}: no {name}{suffix} found, though {len(by_number)} of {first} to {last} "
                f"are there; copy it too, or pass the files that are wanted: {folder}/*{suffix}"
            )
    return files
