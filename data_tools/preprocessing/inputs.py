"""Input files of `--input`, cut into pieces that can be read independently.

| format | document | piece |
|---|---|---|
| .jsonl | line | lines that start in a byte range |
| .jsonl.gz, .jsonl.zst, .txt, .txt.gz, .txt.zst | line, or file | file |
| .parquet | row | range of row groups |
| `hf:NAME[:CONFIG][@SPLIT]` | row | range of record batches of its Arrow files |

Pieces depend only on the files, so that all processes cut them alike.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from data_tools.errors import DataError
from data_tools.files import expand_paths
from data_tools.preprocessing import arrow_files

Format = Literal["jsonl", "txt", "parquet", "arrow"]
_TEXT_FORMATS = (".jsonl", ".txt")
SUFFIXES = (
    *(kind + packing for kind in _TEXT_FORMATS for packing in ("", ".gz", ".zst")),
    ".parquet",
)
HF_PREFIX = "hf:"


class Source(NamedTuple):
    """One `--input` argument and its files."""

    name: str
    files: list[Path]


class Piece(NamedTuple):
    """A part of a file: [begin, end) in bytes, row groups or record batches."""

    path: str
    format: Format
    source: int
    """Number of its `--input` argument."""
    begin: int
    end: int
    size: int
    """Approximate bytes of the file in this piece."""
    first_line: int | None
    """Lines or rows before the piece; None if they have not been counted."""
    stamp: str
    """Size and modification time of the file; it changes with the content."""


def find_inputs(patterns: Sequence[str]) -> list[Source]:
    """Find the files of paths, directories, globs and datasets, in the given order, each sorted.

    Raises:
        DataError: nothing matches, a file has an unknown suffix, or a file matches twice.
    """
    sources: list[Source] = []
    seen: set[Path] = set()
    for pattern in patterns:
        files = _expand(pattern)
        duplicates = seen.intersection(files)
        if duplicates:
            raise DataError(f"{min(duplicates)} is named twice by --input; remove one")
        seen.update(files)
        sources.append(Source(pattern, files))
    return sources


def unread_files(patterns: Sequence[str]) -> list[str]:
    """One line for each directory that also holds files of other suffixes, which are not read."""
    lines = []
    for folder in filter(os.path.isdir, patterns):
        files = expand_paths(folder)
        suffixes = Counter(f.suffix or f.name for f in files if not f.name.endswith(SUFFIXES))
        if suffixes:
            counted = ", ".join(f"{number} {suffix}" for suffix, number in suffixes.most_common(5))
            lines.append(
                f"{folder}: {suffixes.total()} of {len(files)} files are not read, by suffix "
                f"{counted}; name text files .txt to include them"
            )
    return lines


def warn_of_unread(patterns: Sequence[str]) -> None:
    """Print the lines of `unread_files` on standard error."""
    for line in unread_files(patterns):
        print(f"warning: {line}", file=sys.stderr)


def cut_pieces(sources: Sequence[Source], *, piece_bytes: int, json_key: str) -> Iterator[Piece]:
    """Cut files into pieces of about `piece_bytes`, or more where a file cannot be cut.

    Raises:
        DataError: a Parquet or Arrow file cannot be read, or has no text column `json_key`.
    """
    for number, source in enumerate(sources):
        for file in source.files:
            kind = _format(file)
            status = file.stat()
            whole = Piece(
                path=str(file),
                format=kind,
                source=number,
                begin=0,
                end=status.st_size,
                size=status.st_size,
                first_line=0,
                stamp=f"{status.st_size}:{status.st_mtime_ns}",
            )
            if kind in ("parquet", "arrow"):
                yield from _cut_table(whole, piece_bytes, json_key)
            elif file.suffix == ".jsonl":
                yield from _cut_lines(whole, piece_bytes)
            else:
                yield whole


def total_size(sources: Iterable[Source]) -> int:
    """Return the total size of all files on disk, in bytes."""
    return sum(file.stat().st_size for source in sources for file in source.files)


def _expand(pattern: str) -> list[Path]:
    if pattern.startswith(HF_PREFIX):
        return arrow_files.of_dataset(pattern.removeprefix(HF_PREFIX))
    files = expand_paths(pattern, suffixes=SUFFIXES)
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise DataError(
                f"{file}: unknown suffix; {', '.join(_TEXT_FORMATS)} expected, plain or with .gz "
                "or .zst, or .parquet"
            )
    return files


def _format(file: Path) -> Format:
    name = file.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".jsonl"):
        return "jsonl"
    if name.endswith(".txt"):
        return "txt"
    return "parquet" if name.endswith(".parquet") else "arrow"


def _cut_lines(whole: Piece, piece_bytes: int) -> Iterator[Piece]:
    for begin in range(0, max(1, whole.end), piece_bytes):
        end = min(begin + piece_bytes, whole.end)
        yield whole._replace(
            begin=begin, end=end, size=end - begin, first_line=None if begin else 0
        )


def _cut_table(whole: Piece, piece_bytes: int, json_key: str) -> Iterator[Piece]:
    """Cut where the cumulative size of row groups or record batches passes k * `piece_bytes`."""
    groups = arrow_files.row_groups(Path(whole.path), whole.format, json_key)
    rows = [0, *accumulate(group.num_rows for group in groups)]
    sizes = [0, *accumulate(group.num_bytes for group in groups)]
    cuts = [
        i for i in range(1, len(groups)) if sizes[i] // piece_bytes > sizes[i - 1] // piece_bytes
    ]
    for begin, end in pairwise((0, *cuts, len(groups))):
        # The piece's share of the file size on disk, which is what progress counts.
        size = whole.size * (sizes[end] - sizes[begin]) // max(1, sizes[-1])
        yield whole._replace(begin=begin, end=end, size=size, first_line=rows[begin])


def count_lines(path: str | os.PathLike[str], *, end: int) -> int:
    """Count the newlines in the first `end` bytes of a file."""
    count = 0
    with open(path, "rb") as file:
        while end > 0 and (data := file.read(min(end, 1 << 20))):
            count += data.count(b"\n")
            end -= len(data)
    return count
