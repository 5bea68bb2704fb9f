from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_tools.corpus.indexed import IndexedDataset
from data_tools.corpus.indexed_writer import IndexedDatasetWriter, smallest_dtype
from data_tools.errors import DataError
from tests.data_tools.corpora import counting_documents, write_corpus
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)


def _finish(writer: IndexedDatasetWriter) -> None:
    writer.finish(
        tokenizer="t", tokenizer_fingerprint="f", eod_id=None, num_bytes=1, command="a test"
    )


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "int32")],
)
def test_smallest_dtype_holds_the_largest_id(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    assert smallest_dtype(vocab_size).name == dtype
    write_corpus(tmp_path / "c", [np.array([0, vocab_size - 1])], vocab_size=vocab_size)
    assert IndexedDataset(tmp_path / "c").document(0).tolist() == [0, vocab_size - 1]


@pytest.mark.parametrize("wrong", [-1, 70_000, 2**40])
def test_id_out_of_range_is_refused_with_its_location(tmp_path: Path, wrong: int) -> None:
    with IndexedDatasetWriter(tmp_path / "c", vocab_size=70_000) as writer:
        writer.add_document([1, 2])
        where = ("token 1 of document 2", "[0, 70000)")
        with _refused("token id", value=wrong, constraint=where, remedy="vocabulary size"):
            writer.add_documents(np.array([5, 6, 7, wrong, 9]), np.array([2, 3]))


def test_ids_that_are_no_integers_are_refused(tmp_path: Path) -> None:
    with (
        IndexedDatasetWriter(tmp_path / "c", vocab_size=10) as writer,
        _refused(str(tmp_path), value="float64", constraint="integers", remedy="convert"),
    ):
        writer.add_document([1.5])


def test_many_documents_at_once_equal_one_by_one(tmp_path: Path) -> None:
    documents = counting_documents([3, 0, 5, 1])
    write_corpus(tmp_path / "one_by_one", documents, vocab_size=100)
    with IndexedDatasetWriter(tmp_path / "at_once", vocab_size=100) as writer:
        writer.add_documents(np.concatenate(documents), np.array([3, 0, 5, 1]))
        _finish(writer)
    for suffix in (".bin", ".idx"):
        contents = [
            (tmp_path / name).with_suffix(suffix).read_bytes() for name in ("one_by_one", "at_once")
        ]
        assert contents[0] == contents[1]
    assert IndexedDataset(tmp_path / "at_once").num_documents == 3  # the empty one is left out


def test_sidecar_counts_what_was_written(tmp_path: Path) -> None:
    info = write_corpus(tmp_path / "c", counting_documents([3, 4]), vocab_size=99, num_bytes=21)
    assert IndexedDataset(tmp_path / "c").info == info
    assert (info.num_tokens, info.num_documents, info.max_token_id) == (7, 2, 6)
    assert (info.vocab_size, info.num_bytes, info.dtype) == (99, 21, "uint8")


def test_existing_output_is_kept_without_overwrite(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", counting_documents([3]))
    before = (tmp_path / "c.bin").read_bytes()
    with _refused("c.bin", value="exists", constraint="exists", remedy="--overwrite"):
        IndexedDatasetWriter(tmp_path / "c", vocab_size=10)
    assert (tmp_path / "c.bin").read_bytes() == before


def test_overwrite_keeps_the_old_corpus_until_the_new_one_is_complete(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", counting_documents([3]))
    with IndexedDatasetWriter(tmp_path / "c", vocab_size=10, overwrite=True) as writer:
        writer.add_document([9, 9])
        assert IndexedDataset(tmp_path / "c").num_tokens == 3
        _finish(writer)
    assert IndexedDataset(tmp_path / "c").document(0).tolist() == [9, 9]


def test_leaving_without_finish_leaves_nothing_behind(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "c", vocab_size=10) as writer:
        writer.add_document([1])
        assert any(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []


def test_corpus_without_documents_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "c", vocab_size=10) as writer:
        writer.add_document(np.array([], dtype=np.int64))
        with _refused(str(tmp_path / "c"), value="documents", constraint="text", remedy="text"):
            _finish(writer)
    assert list(tmp_path.iterdir()) == []


def test_second_writer_of_the_same_output_is_refused(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "c", vocab_size=10) as first:
        first.add_document([1, 2])
        with _refused(
            "c.bin.partial", value="process", constraint="written", remedy=("wait", "output")
        ):
            IndexedDatasetWriter(tmp_path / "c", vocab_size=10)
        _finish(first)
    assert IndexedDataset(tmp_path / "c").num_tokens == 2


def test_killed_writer_leaves_nothing_that_opens_and_does_not_block_the_next(
    tmp_path: Path,
) -> None:
    program = f"""
import os, signal
from data_tools.corpus.indexed_writer import IndexedDatasetWriter
writer = IndexedDatasetWriter({str(tmp_path / "c")!r}, vocab_size=10)
writer.add_document([1, 2, 3] * 100_000)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program])
    assert done.returncode == -signal.SIGKILL
    assert any(tmp_path.iterdir())
    with _refused("c.idx", value="no such file", constraint="no", remedy="path"):
        IndexedDataset(tmp_path / "c")
    write_corpus(tmp_path / "c", counting_documents([3]))
    assert IndexedDataset(tmp_path / "c").num_tokens == 3
    assert sorted(os.listdir(tmp_path)) == ["c.bin", "c.idx", "c.json"]


def test_output_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with _refused("c.bin", value="File exists", constraint="write", remedy="folder"):
        IndexedDatasetWriter(tmp_path / "file" / "c", vocab_size=10)
