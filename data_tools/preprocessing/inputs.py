"""Which text `--input` names, cut into pieces that can be read on their own.

| format | a document | a piece |
|---|---|---|
| .jsonl | a line | the lines that start in a range of bytes |
| .jsonl.gz, .jsonl.zst, .txt, .txt.gz, .txt.zst | a line, or the file | the file |
| .parquet | a row | a range of row groups |
| `hf:NAME[:CONFIG][@SPLIT]` | a row | a range of record batches of its Arrow files |

Pieces depend on the files and on nothing else, so any number of processes cuts them alike.
"""

from __future__ import annotations

import os
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
    """Bytes of the file that it takes, about."""
    first_line: int | None
    """Lines or rows before it; None where nobody has counted them."""
    stamp: str
    """Size and time of the file: another stamp, another content."""


def find_inputs(patterns: Sequence[str]) -> list[Source]:
    """Files of paths, directories, globs and data sets, in the order given, sorted inside each.

    Raises:
        DataError: nothing is found, a file has another suffix, or one is named twice.
    """
    sources: list[Source] = []
    seen: set[Path] = set()
    for pattern in patterns:
        files = _expand(pattern)
        twice = seen.intersection(files)
        if twice:
            raise DataError(f"{min(twice)} is named twice by --input; leave one out")
        seen.update(files)
        sources.append(Source(pattern, files))
    return sources


def cut_pieces(sources: Sequence[Source], *, piece_bytes: int, json_key: str) -> Iterator[Piece]:
    """Pieces of about `piece_bytes`, or more where a file cannot be cut.

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
    """Bytes of all files as they lie on disk."""
    return sum(file.stat().st_size for source in sources for file in source.files)


def _expand(pattern: str) -> list[Path]:
    if pattern.startswith(HF_PREFIX):
        return arrow_files.of_dataset(pattern.removeprefix(HF_PREFIX))
    files = expand_paths(pattern, suffixes=SUFFIXES)
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise DataError(
                f"{file}: suffix not known; {', '.join(_TEXT_FORMATS)} expected, plain or with .gz "
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
    """Cut where the sizes of row groups or record batches pass a multiple of `piece_bytes`."""
    groups = arrow_files.row_groups(Path(whole.path), whole.format, json_key)
    rows = [0, *accumulate(group.num_rows for group in groups)]
    sizes = [0, *accumulate(group.num_bytes for group in groups)]
    cuts = [
        i for i in range(1, len(groups)) if sizes[i] // piece_bytes > sizes[i - 1] // piece_bytes
    ]
    for begin, end in pairwise((0, *cuts, len(groups))):
        # A share of the file's own size: what is read of it, and what progress counts.
        size = whole.size * (sizes[end] - sizes[begin]) // max(1, sizes[-1])
        yield whole._replace(begin=begin, end=end, size=size, first_line=rows[begin])


def count_lines(path: str | os.PathLike[str], *, end: int) -> int:
    """Line ends in the first `end` bytes of a file."""
    count = 0
    with open(path, "rb") as file:
        while end > 0 and (data := file.read(min(end, 1 << 20))):
            count += data.count(b"\n")
            end -= len(data)
    return count
