"""Batched readers of text columns in Parquet files and Hugging Face datasets (Arrow files).

pyarrow and `datasets` are imported only when such a file is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.errors import DataError, brief

_BATCH_ROWS = 256  # rows converted to Python objects at once
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


class RowGroup(NamedTuple):
    """Size of a part of a file that can be read independently."""

    num_rows: int
    num_bytes: int


def row_groups(path: Path, kind: str, column: str) -> list[RowGroup]:
    """Return the row groups of a Parquet file, or the record batches of an Arrow file.

    Raises:
        DataError: the file is damaged, or has no such text column.
    """
    with readable(path):
        if kind == "parquet":
            import pyarrow.parquet

            with pyarrow.parquet.ParquetFile(path) as file:
                _check_column(path, file.schema_arrow, column)
                parts = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
                return [RowGroup(part.num_rows, part.total_byte_size) for part in parts]
        with _open_arrow(path) as reader:
            _check_column(path, reader.schema, column)
            return [_row_group(batch, column) for batch in reader]


def _row_group(batch: Any, column: str) -> RowGroup:
    values = batch.column(column)
    values.validate()  # what it refers to must be there before it is measured
    return RowGroup(batch.num_rows, values.nbytes)


def read_rows(
    path: Path, kind: str, column: str, *, begin: int, end: int
) -> Iterator[bytes | None]:
    """Yield the column's values in row groups [begin, end) as UTF-8 bytes, None for nulls.

    Raises:
        DataError: the file is damaged, or has no such text column.
    """
    import pyarrow

    with readable(path):
        batches = _parquet_batches if kind == "parquet" else _arrow_batches
        for values in batches(path, column, begin, end):
            check_offsets(values)
            if pyarrow.types.is_dictionary(values.type):
                values = values.dictionary_decode()
            # As bytes, so that invalid UTF-8 makes one bad document and not a bad batch.
            yield from values.cast(pyarrow.large_binary()).to_pylist()


def of_dataset(spec: str) -> list[Path]:
    """Return the Arrow files of NAME[:CONFIG][@SPLIT], a saved directory or a dataset of the Hub.

    Raises:
        DataError: there is no such dataset, it has several splits and none is named, or the
            split is a slice.
    """
    import datasets

    name, _, split = spec.partition("@")
    try:
        if _is_saved(Path(name)):
            found: Any = datasets.load_from_disk(name)
        else:
            name, _, config = name.partition(":")
            found = datasets.load_dataset(name, config or None)
    except Exception as error:  # the library and the Hub raise dozens of types
        raise DataError(
            f"--input hf:{spec}: {brief(error, most=200)}; pass hf:NAME[:CONFIG]"
            "[@SPLIT] of the Hub, or hf:DIRECTORY written by save_to_disk"
        ) from error
    if not isinstance(found, datasets.DatasetDict):
        found = {str(found.split or "train"): found}
    split = split or (next(iter(found)) if len(found) == 1 else "")
    if split not in found:
        raise DataError(
            f"--input hf:{spec}: split {split or 'not given'}; name one of "
            f"{', '.join(found)} as hf:{name}@SPLIT"
        )
    return [Path(file["filename"]) for file in found[split].cache_files]


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _parquet_batches(path: Path, column: str, begin: int, end: int) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        batches = file.iter_batches(
            _BATCH_ROWS, row_groups=range(begin, end), columns=[column], use_threads=False
        )
        for batch in batches:
            yield batch.column(0)


def _arrow_batches(path: Path, column: str, begin: int, end: int) -> Iterator[Any]:
    with _open_arrow(path) as reader:
        for number, batch in enumerate(reader):
            if number >= end:
                return
            for row in range(0, batch.num_rows if number >= begin else 0, _BATCH_ROWS):
                yield batch.column(column).slice(row, _BATCH_ROWS)


@contextmanager
def _open_arrow(path: Path) -> Iterator[Any]:
    import pyarrow

    check_stream_end(path)
    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as reader:
        yield reader


def check_stream_end(path: Path) -> None:
    """Check that a stream has its end marker: pyarrow takes what a killed writer left as whole.

    Raises:
        ArrowInvalid: it does not end with one.
    """
    import pyarrow

    with open(path, "rb") as file:
        file.seek(-min(len(_STREAM_END), path.stat().st_size), os.SEEK_END)
        found = file.read()
    if found != _STREAM_END:
        raise pyarrow.ArrowInvalid(f"the end marker {_STREAM_END.hex()} expected, {found.hex()}")


def check_offsets(values: Any) -> None:
    """Check that the rows of a batch lie in it, which pyarrow leaves to who reads.

    Raises:
        ArrowInvalid: they do not.
    """
    import pyarrow

    values.validate()
    if pyarrow.types.is_dictionary(values.type):
        check_offsets(values.dictionary)
        pyarrow.DictionaryArray.from_arrays(values.indices, values.dictionary)
        return
    raw = {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
        pyarrow.string_view(): pyarrow.binary_view(),
    }.get(values.type)
    if raw is not None:  # characters are checked document by document
        values = pyarrow.Array.from_buffers(
            raw, len(values), values.buffers(), offset=values.offset
        )
    values.validate(full=True)


def _check_column(path: Path, schema: Any, column: str) -> None:
    import pyarrow

    if column not in schema.names:
        raise DataError(
            f"{path}: no column {column!r} (columns: {', '.join(schema.names[:8])}); choose one "
            "with --json-key"
        )
    kind = schema.field(column).type
    # Dictionary encoding stores repeated texts once, with an index per row.
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    texts = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
    raw = (pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view())
    if values not in (*texts, *raw):
        raise DataError(
            f"{path}: column {column!r} is {kind}, not text; choose another with --json-key"
        )


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise the errors of pyarrow as a DataError that names the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read to its end ({brief(error, most=200)}); it is "
            "truncated or damaged: replace the file"
        ) from error
