"""Arrow and Parquet: a column of lists of ids (`input_ids`), a row per document.

Arrow files are those of Hugging Face's `datasets` (the stream format) or of Feather (the file
format). What is written is a folder that `datasets.load_from_disk` opens. pyarrow is imported only
when such a file is read or written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.arrays import IntArray, TokenArray
from data_tools.errors import DataError, NoSuchFileError
from data_tools.formats.blocks import (
    BLOCK_BYTES,
    Block,
    Boundary,
    ReadOptions,
    Source,
    WriteOptions,
)
from data_tools.formats.manifest import Manifest, read_manifest
from data_tools.formats.raw_files import (
    PartialFiles,
    PartialFolder,
    file_size,
    listed_file,
    numbered_files,
)
from data_tools.formats.whole_documents import WholeDocuments, joined
from data_tools.preprocessing.arrow_files import check_offsets, check_stream_end, readable

DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
DEFAULT_COLUMN = "input_ids"
_GROUP_BYTES = 32 << 20  # of ids in a row group that is written
_MAX_ROWS = 1 << 16
_VALUES_AT_ONCE = 1 << 16  # 1024 by default, whose overhead shows
_FEATHER_MAGIC = b"ARROW1"
_DATA_FILE = "data-00000-of-00001.arrow"


def open_parquet(paths: Sequence[Path], options: ReadOptions) -> list[Source]:
    """Open .parquet files, or those of folders.

    Raises:
        DataError: a file is damaged, or has no such column of integer lists.
    """
    import pyarrow.parquet

    files = [file for path in paths for file in numbered_files(path, ".parquet")]
    column = options.column or DEFAULT_COLUMN
    sources = []
    for path in files:
        file_size(path)
        with readable(path), pyarrow.parquet.ParquetFile(path) as file:
            dtype = _dtype(path, file.schema_arrow, column)
            num_bytes = sum(
                file.metadata.row_group(i).total_byte_size
                for i in range(file.metadata.num_row_groups)
            )
            rows = BLOCK_BYTES * file.metadata.num_rows // max(num_bytes, 1)
        batches = partial(_parquet_batches, path, column, min(max(rows, 1), _MAX_ROWS))
        sources.append(_source(path, path.with_suffix(""), "parquet", dtype, batches))
    return sources


def open_arrow(paths: Sequence[Path], options: ReadOptions) -> list[Source]:
    """Open .arrow files, or those of folders, in the order of `save_to_disk` if it wrote one.

    Raises:
        DataError: a file is missing or damaged, or has no such column of integer lists.
    """
    column = options.column or DEFAULT_COLUMN
    sources = []
    for given in paths:
        files = _files_of(given)
        for path in files:
            file_size(path)
            with readable(path), ExitStack() as stack:
                dtype = _dtype(path, _open_arrow(path, stack).schema, column)
            batches = partial(_arrow_batches, path, column)
            prefix = given if len(files) == 1 else path.with_suffix("")
            sources.append(_source(path, prefix, "arrow", dtype, batches))
    return sources


def _source(
    path: Path, prefix: Path, kind: str, dtype: np.dtype[Any], batches: Callable[[], Iterator[Any]]
) -> Source:
    return Source(
        name=str(path),
        dtype=dtype,
        num_bytes=path.stat().st_size,
        paths=[path],
        blocks=partial(_blocks, path, batches),
        recorded=read_manifest(prefix, kind=kind),
    )


def _files_of(path: Path) -> list[Path]:
    """Return the .arrow files of a path; those that a dataset's state.json lists, in its order."""
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_bytes()).get("splits", [])
        raise DataError(
            f"{path}: it holds the splits {', '.join(map(str, splits))}, one data set expected; "
            f"pass one of its folders, such as {path / str(next(iter(splits), 'train'))}"
        )
    state = path / "state.json"
    if not state.is_file():
        return numbered_files(path, ".arrow")
    try:
        names = [each["filename"] for each in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{state}: _data_files {error} cannot be read; save the data set again"
        ) from error
    files = [listed_file(path, name, index=state.name) for name in names]
    for file in files:
        if not file.is_file():
            raise NoSuchFileError(f"{file}: no such file, but {state.name} lists it; copy it too")
    return files


def _dtype(path: Path, schema: Any, column: str) -> np.dtype[Any]:
    import pyarrow

    if (count := schema.names.count(column)) != 1:
        raise DataError(
            f"{path}: {count or 'no'} columns {column!r} found, one expected (columns: "
            f"{', '.join(schema.names[:8])}); choose another with --column"
        )
    kind = schema.field(column).type
    lists = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
    if not any(each(kind) for each in lists) or not pyarrow.types.is_integer(kind.value_type):
        raise DataError(
            f"{path}: column {column!r} is {kind}, not lists of integers; choose another with "
            "--column, or tokenize it with data_tools.preprocess"
        )
    return np.dtype(kind.value_type.to_pandas_dtype())


def _parquet_batches(path: Path, column: str, rows: int) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        for batch in file.iter_batches(rows, columns=[column], use_threads=False):
            yield batch.column(0)


def _arrow_batches(path: Path, column: str) -> Iterator[Any]:
    with ExitStack() as stack:
        reader = _open_arrow(path, stack)
        numbers = range(getattr(reader, "num_record_batches", 0))
        for batch in map(reader.get_batch, numbers) if numbers else reader:
            for row in range(0, batch.num_rows, _MAX_ROWS):
                yield batch.column(column).slice(row, _MAX_ROWS)


def _open_arrow(path: Path, stack: ExitStack) -> Any:
    """Open either of the two formats, which both are called .arrow."""
    import pyarrow

    source = stack.enter_context(pyarrow.memory_map(str(path)))
    is_feather = source.read(len(_FEATHER_MAGIC)) == _FEATHER_MAGIC
    source.seek(0)
    if not is_feather:
        check_stream_end(path)
    opened = pyarrow.ipc.open_file if is_feather else pyarrow.ipc.open_stream
    return stack.enter_context(opened(source))


def _blocks(
    path: Path, batches: Callable[[], Iterator[Any]], boundary: Boundary
) -> Iterator[Block]:
    import pyarrow.compute

    row = 0
    with readable(path):
        for lists in batches():
            check_offsets(lists)
            if lists.null_count:
                first = row + pyarrow.compute.index(lists.is_null(), True).as_py()
                raise DataError(f"{path}: row {first} is null; fill or remove such rows")
            ids = lists.flatten()  # of this slice alone, whatever its parent holds
            ends = np.cumsum(pyarrow.compute.list_value_length(lists).to_numpy(), dtype=np.int64)
            if ids.null_count:
                position = pyarrow.compute.index(ids.is_null(), True).as_py()
                number = row + int(np.searchsorted(ends, position, side="right"))
                raise DataError(f"{path}: row {number} has a null among its ids; remove it")
            yield Block(ids.to_numpy(), ends, path)
            row += len(lists)


class ParquetWriter:
    """Writes OUTPUT.parquet.

    Raises:
        DataError: it exists and `overwrite` is false.
    """

    def __init__(self, output: Path, dtype: np.dtype[Any], options: WriteOptions) -> None:
        import pyarrow.parquet

        path = output.with_name(output.name + ".parquet")
        self._files = PartialFiles(output, [path], options)
        schema = _schema(dtype, options)
        self._writer = pyarrow.parquet.ParquetWriter(
            self._files[0],
            schema,
            # Parquet stores ids of 16 bits in 32, and this in about as many as they have: as small
            # as what zstd makes of them, in less time.
            column_encoding={f"{schema.names[0]}.list.element": "DELTA_BINARY_PACKED"},
            compression="none",
            write_batch_size=_VALUES_AT_ONCE,
            use_dictionary=False,
            write_page_checksum=True,
        )
        self._documents = WholeDocuments(partial(self._write, schema), group_bytes=_GROUP_BYTES)
        self.add = self._documents.add

    def _write(self, schema: Any, parts: list[TokenArray], lengths: IntArray) -> None:
        self._writer.write_batch(_batch(schema, parts, lengths), row_group_size=len(lengths))

    def finish(self, manifest: Manifest) -> None:
        self._documents.flush()
        self._writer.close()
        self._files.publish(manifest)

    def close(self) -> None:
        # Else it would be closed when it is deleted, which prints a traceback on a full disk.
        with suppress(OSError):
            self._writer.close()
        self._writer.is_open = False
        self._files.close()


class ArrowWriter:
    """Writes the folder OUTPUT as `Dataset.save_to_disk` does.

    Raises:
        DataError: it exists and `overwrite` is false.
    """

    def __init__(self, output: Path, dtype: np.dtype[Any], options: WriteOptions) -> None:
        import pyarrow

        self._folder = PartialFolder(output, options)
        schema = _schema(dtype, options)
        self._schema = schema
        self._file = self._folder.open_stream(_DATA_FILE)
        self._writer = pyarrow.ipc.new_stream(self._file, schema)
        self._documents = WholeDocuments(self._write, group_bytes=BLOCK_BYTES)
        self.add = self._documents.add

    def _write(self, parts: list[TokenArray], lengths: IntArray) -> None:
        self._writer.write_batch(_batch(self._schema, parts, lengths))

    def finish(self, manifest: Manifest) -> None:
        self._documents.flush()
        self._writer.close()
        self._folder.end_stream(_DATA_FILE, self._file)
        fingerprint = hashlib.sha256(manifest.to_bytes()).hexdigest()[:16]
        for name, content in (
            ("dataset_info.json", {"features": _features(self._schema)}),
            ("state.json", _state(fingerprint)),
        ):
            (self._folder.path / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
        self._folder.publish(manifest)

    def close(self) -> None:
        with suppress(OSError):  # a full disk
            self._file.close()
        self._folder.close()


def _schema(dtype: np.dtype[Any], options: WriteOptions) -> Any:
    import pyarrow

    ids = pyarrow.list_(pyarrow.from_numpy_dtype(dtype))
    return pyarrow.schema([(options.column or DEFAULT_COLUMN, ids)])


def _batch(schema: Any, parts: list[TokenArray], lengths: IntArray) -> Any:
    import pyarrow

    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    lists = pyarrow.ListArray.from_arrays(offsets, _values(schema, parts))
    return pyarrow.record_batch([lists.cast(schema.field(0).type)], schema)


def _values(schema: Any, parts: list[TokenArray]) -> Any:
    import pyarrow

    # A group of empty documents has no parts.
    return pyarrow.array(joined(parts) if parts else [], schema.field(0).type.value_type)


def _features(schema: Any) -> dict[str, Any]:
    field = schema.field(0)
    value = {"dtype": str(field.type.value_type), "_type": "Value"}
    return {field.name: {"feature": value, "_type": "List"}}


def _state(fingerprint: str) -> dict[str, Any]:
    return {
        "_data_files": [{"filename": _DATA_FILE}],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
