from __future__ import annotations

import gzip
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_tools.corpus.indexed import IndexedDataset
from data_tools.errors import DataError
from data_tools.formats import raw_files
from tests.data_tools.formats.conversions import (
    DOCUMENTS,
    EOD,
    assert_same_files,
    convert,
    corpus,
    documents,
    forget,
    megatron,
    package,
)
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)
IDS = [1, 2, 3, EOD, 4, EOD, EOD, 5, 6, 7, 8, 10, 11, EOD]
LINES = b"0,4\n4,6\n6,7\n7,14\n"


def _theirs(folder: Path, ids: list[int], lines: bytes | None, *, code: str = "H") -> Path:
    """Files as Dolma and OLMo-core write them: raw ids, and gzipped lines."""
    (folder / "part.npy").write_bytes(struct.pack(f"<{len(ids)}{code}", *ids))
    if lines is not None:
        (folder / "part.csv.gz").write_bytes(gzip.compress(lines))
    return folder / "part.npy"


@pytest.mark.parametrize("code", ["B", "H", "I", "Q"])
def test_raw_ids_and_lines_are_read_in_the_dtype_of_their_size(tmp_path: Path, code: str) -> None:
    back = megatron(tmp_path, "olmo", _theirs(tmp_path, IDS, LINES, code=code))
    assert documents(back) == DOCUMENTS
    dtype = {"B": "uint8", "H": "uint16", "I": "int32", "Q": "int64"}[code]
    assert IndexedDataset(back).dtype.name == dtype


def test_our_files_are_raw_ids_and_lines(tmp_path: Path) -> None:
    convert("--from", "megatron", "--to", "olmo", corpus(tmp_path), "--output", tmp_path / "part")
    assert (tmp_path / "part.npy").read_bytes() == struct.pack("<14H", *IDS)
    assert gzip.decompress((tmp_path / "part.csv.gz").read_bytes()) == LINES
    back = megatron(tmp_path, "olmo", tmp_path / "part")
    assert_same_files(back, tmp_path / "ours")


@pytest.mark.parametrize("size", [1, 3, 5])
def test_documents_are_kept_at_any_block_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 2 * size)
    monkeypatch.setattr("data_tools.formats.olmo._LINES", size)
    convert("--from", "megatron", "--to", "olmo", corpus(tmp_path), "--output", tmp_path / "part")
    assert gzip.decompress((tmp_path / "part.csv.gz").read_bytes()) == LINES
    assert documents(megatron(tmp_path, "olmo", tmp_path / "part.npy")) == DOCUMENTS


def test_further_columns_may_hold_anything(tmp_path: Path) -> None:
    lines = b'0,4,id-1,s3://a/#1.json.gz,1\n4,6,"it\'s, 3",x,2\n6,7,\n7,14\n'
    assert documents(megatron(tmp_path, "olmo", _theirs(tmp_path, IDS, lines))) == DOCUMENTS


def test_several_files_keep_the_documents_of_each(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for name, ids in (("a", [1, 2]), ("b", [3])):
        _theirs(tmp_path / "shards", ids, f"0,{len(ids)}\n".encode())
        for suffix in (".npy", ".csv.gz"):
            (tmp_path / "shards" / f"part{suffix}").rename(tmp_path / "shards" / f"{name}{suffix}")
    assert documents(megatron(tmp_path, "olmo", tmp_path / "shards")) == [[1, 2], [3]]
    _theirs(tmp_path / "shards", [3, 70_000], b"0,2\n", code="I")
    with _refused("part.npy", "uint32", ("uint16", "a.npy"), "apart"):
        megatron(tmp_path, "olmo", tmp_path / "shards", options=["--overwrite"])


def test_without_metadata_the_dtype_and_end_token_must_be_given(tmp_path: Path) -> None:
    path = _theirs(tmp_path, IDS, None)
    with _refused("part.npy", "part.csv.gz", "documents", ("--eod", "--dtype")):
        megatron(tmp_path, "olmo", path)
    with _refused("part.npy", "part.csv.gz", "dtype", "--dtype"):
        megatron(tmp_path, "olmo", path, options=["--eod", EOD])
    for given in (["--bos", EOD], ["--no-boundaries"]):
        with _refused("part.npy", given[0], ("part.csv.gz", "--eod"), ("nanogpt", str(given[0]))):
            megatron(tmp_path, "olmo", path, options=[*given, "--dtype", "uint16"])
    options = ["--eod", EOD, "--dtype", "uint16"]
    assert documents(megatron(tmp_path, "olmo", path, options=options)) == DOCUMENTS


@pytest.mark.parametrize(
    ("ids", "lines", "name", "value", "constraint", "remedy"),
    [
        (IDS[:-1], LINES, "part.npy", "26", ("part.csv.gz", "token 14"), "copy"),
        ([*IDS, 7], LINES, "part.npy", "30", ("part.csv.gz", "token 14"), "--eod"),
        (IDS, b"0,4\n5,14\n", "part.csv.gz", "2", ("5,14", "from 4 on"), "again"),
        (IDS, b"0,4\n4,3\n3,14\n", "part.csv.gz", "2", ("4,3", "from 4 on"), "again"),
        (IDS, b"0,4\nfour,14\n", "part.csv.gz", "0", "four", "copy"),
        (IDS, b"", "part.csv.gz", "0", "tokens", "again"),
        (IDS, b"0,4\n4,6\n6,6\n6,14\n", "part.npy", "2", "0 tokens", "--drop-empty"),
    ],
)
def test_metadata_that_disagrees_is_refused(
    tmp_path: Path,
    ids: list[int],
    lines: bytes,
    name: str,
    value: str,
    constraint: str,
    remedy: str,
) -> None:
    path = _theirs(tmp_path, ids, lines)
    with _refused(name, value, constraint, remedy):
        megatron(tmp_path, "olmo", path)
    assert not list(tmp_path.glob("back*"))


def test_cut_metadata_and_numpys_own_files_are_refused(tmp_path: Path) -> None:
    path = _theirs(tmp_path, IDS, LINES)
    content = (tmp_path / "part.csv.gz").read_bytes()
    for damaged in (content[:-9], content[:15] + b"\xff" * 4 + content[19:], b"0,4\n"):
        (tmp_path / "part.csv.gz").write_bytes(damaged)
        with _refused("part.csv.gz", "0", "read", "copy"):
            megatron(tmp_path, "olmo", path)
    np.save(tmp_path / "own.npy", np.arange(4))
    with _refused("own.npy", "0", "NUMPY", "tofile"):
        megatron(tmp_path, "olmo", tmp_path / "own.npy")


def test_ids_of_a_signed_dtype_are_kept(tmp_path: Path) -> None:
    ours = corpus(tmp_path, [[70_000, EOD], [2, EOD]], vocab_size=100_000)
    convert("--from", "megatron", "--to", "olmo", ours, "--output", tmp_path / "part")
    assert (tmp_path / "part.npy").read_bytes() == struct.pack("<4I", 70_000, EOD, 2, EOD)
    forget(tmp_path / "part")
    assert documents(megatron(tmp_path, "olmo", tmp_path / "part")) == [[70_000, EOD], [2, EOD]]


@pytest.mark.ecosystem
def test_olmo_core_reads_ours_and_we_read_its_files(tmp_path: Path) -> None:
    package("olmo_core.data")
    utils = package("olmo_core.data.utils")
    convert("--from", "megatron", "--to", "olmo", corpus(tmp_path), "--output", tmp_path / "part")
    ours = str(tmp_path / "part.npy")
    expected = [(0, 4), (4, 6), (6, 7), (7, 14)]
    assert list(utils.iter_document_indices(ours)) == expected
    by_token = utils.iter_document_indices(ours, eos_token_id=EOD, dtype=np.uint16)
    assert [tuple(map(int, span)) for span in by_token] == expected
    read = [utils.load_array_slice(ours, begin, end, np.uint16).tolist() for begin, end in expected]
    assert read == DOCUMENTS
    for dtype, ids in ((np.uint16, IDS), (np.uint32, [*IDS[:-1], 70_000, EOD])):
        folder = tmp_path / np.dtype(dtype).name
        utils.write_array_to_disk(np.array(ids, dtype), folder / "their.npy")
        utils.write_document_indices(folder / "their.npy", dtype=dtype, eos_token_id=EOD)
        back = megatron(folder, "olmo", folder / "their.npy")
        assert [token for text in documents(back) for token in text] == ids
        assert documents(back)[:3] == DOCUMENTS[:3]
