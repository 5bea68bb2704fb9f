from __future__ import annotations

import struct
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.corpus.indexed import IndexedDataset
from data_tools.errors import DataError
from data_tools.formats import arrow, raw_files
from tests.data_tools.formats.conversions import (
    DOCUMENTS,
    EOD,
    assert_same_files,
    convert,
    corpus,
    documents,
    forget,
    megatron,
)
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)
KINDS = ("parquet", "arrow")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


def _written(folder: Path, kind: str, rows: Any, kind_of_list: Any = None) -> Path:
    """Rows as pyarrow writes them, Arrow in the stream format."""
    column = pa.array(rows, kind_of_list or pa.list_(pa.int32()))
    table = pa.table({"input_ids": column, "n": list(range(len(rows)))})
    path = folder / f"theirs.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


def _read(output: Path, kind: str) -> list[list[int]]:
    if kind == "parquet":
        return pq.read_table(output.with_name(output.name + ".parquet"))["input_ids"].to_pylist()
    return datasets.load_from_disk(str(output))["input_ids"][:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_documents_are_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, size: int
) -> None:
    for module in (raw_files, arrow):
        monkeypatch.setattr(module, "BLOCK_BYTES", 2 * size)
    monkeypatch.setattr(arrow, "_GROUP_BYTES", 6 * size)
    ours, output = corpus(tmp_path), tmp_path / "out"
    convert("--from", "megatron", "--to", kind, ours, "--output", output)
    assert _read(output, kind) == DOCUMENTS
    back = megatron(tmp_path, kind, output)
    assert_same_files(back, ours)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("ids", "dtype"),
    [
        (pa.list_(pa.int32()), "int32"),
        (pa.large_list(pa.uint16()), "uint16"),
        (pa.list_(pa.uint32()), "int32"),
        (pa.list_(pa.int64()), "int64"),
    ],
)
def test_lists_of_any_integers_are_read(tmp_path: Path, kind: str, ids: Any, dtype: str) -> None:
    back = megatron(tmp_path, kind, _written(tmp_path, kind, DOCUMENTS, ids))
    assert documents(back) == DOCUMENTS
    assert IndexedDataset(back).dtype.name == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_lists_of_a_fixed_size_and_other_columns_are_read(tmp_path: Path, kind: str) -> None:
    path = _written(tmp_path, kind, [[1, 2], [3, 4]], pa.list_(pa.int32(), 2))
    assert documents(megatron(tmp_path, kind, path)) == [[1, 2], [3, 4]]
    with _refused(f"theirs.{kind}", "int64", ("'n'", "lists"), "--column"):
        megatron(tmp_path, kind, path, options=["--column", "n", "--overwrite"])
    with _refused(f"theirs.{kind}", "'ids'", "input_ids, n", "--column"):
        megatron(tmp_path, kind, path, options=["--column", "ids", "--overwrite"])


@pytest.mark.parametrize("kind", KINDS)
def test_nulls_are_refused_with_their_row(tmp_path: Path, kind: str) -> None:
    for rows in ([[1], [2], [3], None], [[1], [2], [3], [4, None]]):
        with _refused(f"theirs.{kind}", "3", "null", "remove"):
            megatron(tmp_path, kind, _written(tmp_path, kind, rows))
    assert not list(tmp_path.glob("back*"))


@pytest.mark.parametrize("kind", KINDS)
def test_empty_rows_are_kept_where_they_can_be(tmp_path: Path, kind: str) -> None:
    rows = [[], [1, 2], [], [], [3]]
    path = _written(tmp_path, kind, rows)
    for target in KINDS:
        output = tmp_path / f"to_{target}"
        convert("--from", kind, "--to", target, path, "--output", output)
        assert _read(output, target) == rows
    with _refused(f"theirs.{kind}", "0", "0 tokens", "--drop-empty"):
        megatron(tmp_path, kind, path)
    with _refused(f"theirs.{kind}", "0", ("0 tokens", "9 of --eod"), "--drop-empty"):
        convert("--from", kind, "--to", kind, path, "--output", tmp_path / "no", "--eod", EOD)
    assert documents(megatron(tmp_path, kind, path, options=["--drop-empty"])) == [[1, 2], [3]]


def test_datasets_reads_ours_and_we_read_what_it_saves(tmp_path: Path) -> None:
    texts = [np.arange(70_000, 70_003), [EOD], [4, EOD]]
    whole = datasets.Dataset.from_dict({"input_ids": [[7, 7], *texts, [5]]})
    part = whole.select(range(1, 4))  # a slice, whose Arrow buffers hold the other rows as well
    part.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    expected = [list(text) for text in texts]
    assert documents(megatron(tmp_path, "arrow", tmp_path / "saved")) == expected
    convert(
        *("--from", "arrow", "--to", "arrow", tmp_path / "saved", "--output", tmp_path / "again")
    )
    again = datasets.load_from_disk(str(tmp_path / "again"))
    assert again["input_ids"][:] == expected
    assert again.features == part.features
    part.to_parquet(str(tmp_path / "part.parquet"))
    back = megatron(tmp_path, "parquet", tmp_path / "part", options=["--overwrite"])
    assert documents(back) == expected


def test_a_saved_data_set_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"input_ids": [[1], [2], [3]]})
    datasets.DatasetDict({"a": data, "b": data}).save_to_disk(str(tmp_path / "all"))
    with _refused("all", "a, b", "one", str(tmp_path / "all" / "a")):
        megatron(tmp_path, "arrow", tmp_path / "all")
    data.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    (tmp_path / "saved" / "data-00001-of-00003.arrow").unlink()
    with _refused("data-00001-of-00003.arrow", "file", "state.json", "copy"):
        megatron(tmp_path, "arrow", tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": []}')
    with _refused("saved", "0", "files", "pass"):
        megatron(tmp_path, "arrow", tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{}")
    with _refused("state.json", "_data_files", "read", "again"):
        megatron(tmp_path, "arrow", tmp_path / "saved")


def test_both_formats_that_are_called_arrow_are_read(tmp_path: Path) -> None:
    table = pa.table({"input_ids": DOCUMENTS})
    with pa.ipc.new_file(tmp_path / "feather.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    assert documents(megatron(tmp_path, "arrow", tmp_path / "feather.arrow")) == DOCUMENTS


@pytest.mark.parametrize("kind", KINDS)
def test_two_columns_of_one_name_are_refused(tmp_path: Path, kind: str) -> None:
    ids = pa.array(DOCUMENTS)
    table = pa.table([ids, ids], names=["input_ids", "input_ids"])
    path = tmp_path / f"theirs.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    with _refused(f"theirs.{kind}", "2", ("'input_ids'", "one"), "--column"):
        megatron(tmp_path, kind, path)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_and_foreign_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = _written(tmp_path, kind, DOCUMENTS)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"no such format at all"):
        path.write_bytes(damaged)
        with _refused(f"theirs.{kind}", "read", "end", "replace"):
            megatron(tmp_path, kind, path)
    path.write_bytes(b"")
    with _refused(f"theirs.{kind}", "0", "ids", "again"):
        megatron(tmp_path, kind, path)
    assert not list(tmp_path.glob("back*"))


def test_rows_that_do_not_lie_in_their_batch_are_refused(tmp_path: Path) -> None:
    """pyarrow itself would return other ids for them."""
    path, table = tmp_path / "theirs.arrow", pa.table({"input_ids": DOCUMENTS})
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    content = path.read_bytes()
    offsets = struct.pack("<5i", 0, 4, 6, 7, 14)
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, struct.pack("<5i", 0, 7, 6, 7, 14)))
    with _refused("theirs.arrow", "read", "end", "replace"):
        megatron(tmp_path, "arrow", path)
    path.write_bytes(content.replace(b"input_ids", b"\xff" * 9))
    with _refused("theirs.arrow", "decode", "end", "replace"):
        megatron(tmp_path, "arrow", path)
    assert not list(tmp_path.glob("back*"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_file_is_found_and_an_output_replaced_on_demand(
    tmp_path: Path, kind: str
) -> None:
    ours, output = corpus(tmp_path), tmp_path / "out"
    convert("--from", "megatron", "--to", kind, ours, "--output", output, "--column", "ids")
    with _refused("out", "exists", "", "--overwrite"):
        convert("--from", "megatron", "--to", kind, ours, "--output", output)
    other = corpus(_folder(tmp_path / "other"), [[1, EOD], *DOCUMENTS[1:]])
    manifest = (tmp_path / "out.corpus.json").read_bytes()
    convert("--from", "megatron", "--to", kind, other, "--output", output, "--overwrite")
    (tmp_path / "out.corpus.json").write_bytes(manifest)
    with _refused("out", "tokens", "14 expected", "copy"):
        megatron(tmp_path, kind, output)
    forget(output)
    assert len(documents(megatron(tmp_path, kind, output))) == 4


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
