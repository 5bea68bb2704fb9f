from __future__ import annotations

import struct
from functools import partial
from pathlib import Path

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
IDS = [token for document in DOCUMENTS for token in document]
ENDS = [4, 6, 7, 14]


def _theirs(
    folder: Path, ids: list[int], ends: list[int], *, code: str = "H", name: str = "0_unshuffled"
) -> Path:
    """Files as datatrove's TokenizedFile writes them."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.ds").write_bytes(struct.pack(f"<{len(ids)}{code}", *ids))
    (folder / f"{name}.ds.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    return folder / f"{name}.ds"


@pytest.mark.parametrize(("code", "dtype"), [("H", "uint16"), ("I", "int32")])
def test_ids_and_ends_are_read_in_the_width_of_their_size(
    tmp_path: Path, code: str, dtype: str
) -> None:
    back = megatron(tmp_path, "datatrove", _theirs(tmp_path, IDS, ENDS, code=code))
    assert documents(back) == DOCUMENTS
    assert IndexedDataset(back).dtype.name == dtype


@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_our_files_are_ids_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 8 * size)
    ours, prefix = corpus(tmp_path), tmp_path / "00000"
    convert("--from", "megatron", "--to", "datatrove", ours, "--output", prefix)
    assert (tmp_path / "00000.ds").read_bytes() == struct.pack("<14H", *IDS)
    assert (tmp_path / "00000.ds.index").read_bytes() == struct.pack("<4Q", *ENDS)
    back = megatron(tmp_path, "datatrove", prefix)
    assert_same_files(back, ours)


def test_a_folder_is_read_in_the_order_of_its_names_without_the_empty_file(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    _theirs(folder, [3, EOD], [2], name="00001")
    _theirs(folder, [1, 2, EOD, EOD], [3, 4], name="00000")
    _theirs(folder, [], [], name="00002")
    expected = [[1, 2, EOD], [EOD], [3, EOD]]
    assert documents(megatron(tmp_path, "datatrove", folder)) == expected
    for name in ("00000", "00001"):
        (folder / f"{name}.ds").unlink()
    with _refused("out", "0", "1 .ds", "again"):
        megatron(tmp_path, "datatrove", folder, options=["--overwrite"])


@pytest.mark.parametrize(
    ("ids", "ends", "name", "value", "constraint", "remedy"),
    [
        (IDS[:-1], ENDS, "0_unshuffled.ds", "26", ("token 14", "28 bytes"), "copy"),
        (IDS, ENDS[:-2], "0_unshuffled.ds", "28", ("token 6", "12 bytes"), "copy"),
        (IDS, [4, 3, 14], "0_unshuffled.ds.index", "3", "byte 8", "copy"),
        (IDS, [4, 4, 14], "0_unshuffled.ds", "1", "0 tokens", "--drop-empty"),
        (IDS, [14 << 56], "0_unshuffled.ds", "28", "token", "copy"),
        (IDS, [1 << 63], "0_unshuffled.ds.index", str(1 << 63), "byte 0", "copy"),
    ],
)
def test_an_index_that_disagrees_is_refused(
    tmp_path: Path,
    ids: list[int],
    ends: list[int],
    name: str,
    value: str,
    constraint: str,
    remedy: str,
) -> None:
    path = _theirs(tmp_path, ids, ends)
    with _refused(name, value, constraint, remedy):
        megatron(tmp_path, "datatrove", path)
    assert not list(tmp_path.glob("back*"))


def test_an_index_of_half_the_ids_is_told_from_wider_ids_by_the_metadata(tmp_path: Path) -> None:
    path = _theirs(tmp_path, IDS, ENDS[:-1])  # 28 bytes: 7 ids of 4 bytes, or 14 of 2
    back = megatron(tmp_path, "datatrove", path)
    assert documents(back)[0] == [1 + (2 << 16), 3 + (EOD << 16), 4 + (EOD << 16), EOD + (5 << 16)]
    (tmp_path / "0_unshuffled.ds.metadata").write_text("gpt2|2\n14\n14 T")
    with _refused("0_unshuffled.ds", "28", ("token 7", "uint16"), "copy"):
        megatron(tmp_path, "datatrove", path, options=["--overwrite"])
    (tmp_path / "0_unshuffled.ds.metadata").write_text("gpt2|8\n14\n14 T")
    with _refused("0_unshuffled.ds.metadata", "8", "2 or 4", "again"):
        megatron(tmp_path, "datatrove", path, options=["--overwrite"])


def test_a_missing_or_cut_index_and_a_loss_mask_are_refused(tmp_path: Path) -> None:
    path = _theirs(tmp_path, IDS, ENDS)
    index = tmp_path / "0_unshuffled.ds.index"
    index.write_bytes(index.read_bytes()[:-3])
    with _refused("0_unshuffled.ds.index", "29", "8", "copy"):
        megatron(tmp_path, "datatrove", path)
    index.unlink()
    with _refused("0_unshuffled.ds.index", "file", "such", "--eod"):
        megatron(tmp_path, "datatrove", path)
    _theirs(tmp_path, IDS, ENDS)
    (tmp_path / "0_unshuffled.ds.loss").write_bytes(b"\1" * 14)
    with _refused("0_unshuffled.ds.loss", "0_unshuffled.ds", "trained", "move"):
        megatron(tmp_path, "datatrove", path)


def test_empty_documents_are_left_out_on_demand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _theirs(tmp_path, IDS, [0, 4, 4, 4, 6, 7, 14, 14])
    assert documents(megatron(tmp_path, "datatrove", path, options=["--drop-empty"])) == DOCUMENTS
    assert "4 empty documents" in capsys.readouterr().out


def test_one_million_wide_ids_do_not_fit(tmp_path: Path) -> None:
    ours = corpus(tmp_path, [[1, 1 << 32, EOD]], vocab_size=1 << 40)
    with _refused("ours.bin", str(1 << 32), ("token 1", "document 0", "byte 8"), "--to"):
        convert("--from", "megatron", "--to", "datatrove", ours, "--output", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.ecosystem
@pytest.mark.parametrize("token_size", [2, 4])
def test_datatrove_reads_ours_and_we_read_its_files(tmp_path: Path, token_size: int) -> None:
    package("datatrove")
    tokens = package("datatrove.pipeline.tokens.tokenizer")
    dataset = package("datatrove.utils.dataset")
    last = 70_000 if token_size == 4 else 11
    texts = [*DOCUMENTS[:-1], [5, last, EOD]]
    ours = corpus(tmp_path, texts, vocab_size=100_000 if token_size == 4 else 60_000)
    convert("--from", "megatron", "--to", "datatrove", ours, "--output", tmp_path / "00000")
    # 10 ids in windows of 5, with the position of each in its document, from the index.
    read = dataset.DatatroveFileDataset(
        str(tmp_path / "00000.ds"), seq_len=4, token_size=token_size, return_positions=True
    )
    windows = [read[i] for i in range(len(read))]
    flat = [token for text in texts for token in text]
    assert [window["input_ids"].tolist() for window in windows] == [flat[:5], flat[5:]]
    positions = [window["positions"].tolist() for window in windows]
    # A document that began in an earlier window is counted from the begin of the window.
    assert positions == [[0, 1, 2, 3, 0], [0, 0, 0, 1, 2]]

    file = tokens.TokenizedFile(str(tmp_path / "theirs"), "x.ds", token_size=token_size)
    for text in texts:
        file.write(text, None)
    file.close()
    back = megatron(tmp_path, "datatrove", tmp_path / "theirs")
    assert documents(back) == texts
    forget(tmp_path / "00000")
    again = megatron(tmp_path, "datatrove", tmp_path / "00000", options=["--overwrite"])
    assert documents(again) == texts
