from __future__ import annotations

import json
import struct
from functools import partial
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data_tools.errors import DataError
from data_tools.preprocessing.arrow_files import read_rows
from data_tools.preprocessing.documents import PieceReader, extract_text, locate
from data_tools.preprocessing.inputs import cut_pieces, find_inputs
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)

_TEXTS = [f"row {i} " + "word " * (i % 7) + "\u00e9" for i in range(2000)]


_KINDS = {
    "as numbers of a dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    "as numbers of large texts": pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string()),
    "as numbers of bytes": pyarrow.dictionary(pyarrow.int32(), pyarrow.binary()),
    "as views": pyarrow.string_view(),
    "as views of bytes": pyarrow.binary_view(),
    "large": pyarrow.large_string(),
}


@pytest.mark.parametrize("kind", _KINDS)
def test_text_is_read_however_a_table_stores_it(tmp_path: Path, kind: str) -> None:
    texts = ["one", "two", None, "one", "caf\u00e9"] * 200
    column = pyarrow.array(texts, pyarrow.string())
    if pyarrow.types.is_dictionary(_KINDS[kind]):
        column = column.cast(_KINDS[kind].value_type).dictionary_encode()
    table = pyarrow.table({"text": column.cast(_KINDS[kind])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    assert pyarrow.parquet.read_schema(tmp_path / "a.parquet").field("text").type != "string"
    found = [text for _, text in _locations_and_texts([str(tmp_path / "a.parquet")], 1)]
    assert found == [text or "" for text in texts]


def test_dictionary_encoded_numbers_are_not_text(tmp_path: Path) -> None:
    table = pyarrow.table({"text": pyarrow.array([1, 2, 1]).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with _refused("a.parquet", value="'text'", constraint="int64", remedy="--json-key"):
        _locations_and_texts([str(tmp_path / "a.parquet")], 1)


def _write_parquet(path: Path, texts: list[str | None], *, column: str = "text") -> Path:
    table = pyarrow.table({column: pyarrow.array(texts, pyarrow.string()), "n": range(len(texts))})
    pyarrow.parquet.write_table(table, path, row_group_size=100)
    return path


def _locations_and_texts(patterns: list[str], piece_bytes: int) -> list[tuple[str, str]]:
    found = []
    for piece in cut_pieces(find_inputs(patterns), piece_bytes=piece_bytes, json_key="text"):
        for document in PieceReader(piece, json_key="text"):
            text = extract_text(document, json_key="text")
            found.append((locate(document, piece).location, text))
    return found


def test_inputs_are_found_once_and_in_order(tmp_path: Path) -> None:
    for name in ("z.txt", "folder/b.jsonl", "folder/a.txt.gz", "folder/c.parquet", "folder/i.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    patterns = [str(tmp_path / "z.txt"), str(tmp_path / "folder")]
    sources = find_inputs(patterns)
    assert [source.name for source in sources] == patterns
    names = [file.name for source in sources for file in source.files]
    assert names == ["z.txt", "a.txt.gz", "b.jsonl", "c.parquet"]
    with _refused("z.txt", value="--input", constraint="twice", remedy="remove"):
        find_inputs([*patterns, str(tmp_path / "*.txt")])
    with _refused("i.png", value="suffix", constraint="unknown", remedy=(".jsonl", ".txt")):
        find_inputs([str(tmp_path / "folder" / "i.png")])


@pytest.mark.parametrize("piece_bytes", [1, 7, 100, 4096, 1 << 20])
def test_lines_are_the_same_wherever_a_file_is_cut(tmp_path: Path, piece_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in _TEXTS[:100]]
    path.write_text("\r\n".join(lines[:50]) + "\n\n" + "\n".join(lines[50:]))
    expected = [
        (f"{path}:{i + (1 if i <= 50 else 2)}", text) for i, text in enumerate(_TEXTS[:100])
    ]
    expected[50] = (f"{path}:52", _TEXTS[50])
    assert _locations_and_texts([str(path)], piece_bytes) == expected


@pytest.mark.parametrize("piece_bytes", [1, 5000, 1 << 30])
def test_rows_are_the_same_wherever_a_table_is_cut(tmp_path: Path, piece_bytes: int) -> None:
    path = _write_parquet(tmp_path / "a.parquet", list(_TEXTS))
    expected = [(f"{path}:{i}", text) for i, text in enumerate(_TEXTS, start=1)]
    assert _locations_and_texts([str(path)], piece_bytes) == expected


@pytest.mark.parametrize("piece_bytes", [1, 1 << 30])
def test_saved_dataset_and_hub_style_folder_give_their_rows(
    tmp_path: Path, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_dict({"text": _TEXTS}).save_to_disk(str(tmp_path / "saved"))
    found = _locations_and_texts([f"hf:{tmp_path / 'saved'}"], piece_bytes)
    assert [text for _, text in found] == _TEXTS
    folder = tmp_path / "like_the_hub"
    folder.mkdir()
    _write_parquet(folder / "train.parquet", list(_TEXTS))
    _write_parquet(folder / "test.parquet", ["held out"])
    found = _locations_and_texts([f"hf:{folder}@train"], piece_bytes)
    assert [text for _, text in found] == _TEXTS
    with _refused(
        "--input", value="split", constraint="not given", remedy=("train, test", "@SPLIT")
    ):
        find_inputs([f"hf:{folder}"])
    with _refused(
        "--input", value="train[:10%]", constraint="split", remedy=("train, test", "@SPLIT")
    ):
        find_inputs([f"hf:{folder}@train[:10%]"])


def test_dataset_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with _refused(
        "--input", value=f"hf:{tmp_path}/absent", constraint="absent", remedy="hf:NAME[:CONFIG]"
    ):
        find_inputs([f"hf:{tmp_path}/absent"])


def test_rows_without_text_are_empty_and_rows_that_are_not_utf8_are_bad(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    values = pyarrow.array([b"good", None, b"\xff"], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)
    [piece] = cut_pieces(find_inputs([str(path)]), piece_bytes=1 << 30, json_key="text")
    good, empty, bad = PieceReader(piece, json_key="text")
    assert [extract_text(document, json_key="text") for document in (good, empty)] == ["good", ""]
    with _refused("a.parquet:3", value=0, constraint="UTF-8", remedy="--on-bad-line"):
        extract_text(bad, json_key="text")


@pytest.mark.parametrize(
    ("name", "column", "parts"),
    [
        ("a.parquet", "body", ("a.parquet", "'body'", "text, n", "--json-key")),
        ("a.parquet", "n", ("a.parquet", "'n'", "int64", "--json-key")),
    ],
)
def test_column_that_holds_no_text_is_refused(
    tmp_path: Path, name: str, column: str, parts: tuple
) -> None:
    sources = find_inputs([str(_write_parquet(tmp_path / name, ["a"]))])
    with assert_refused(*parts, error=DataError):
        list(cut_pieces(sources, piece_bytes=100, json_key=column))


@pytest.mark.parametrize("damage", ["cut in half", "empty", "a flipped byte in every page"])
def test_damaged_parquet_is_an_error_never_a_shorter_corpus(tmp_path: Path, damage: str) -> None:
    path = _write_parquet(tmp_path / "a.parquet", list(_TEXTS))
    content = bytearray(path.read_bytes())
    if damage == "a flipped byte in every page":
        for position in range(20, len(content) - 20_000, 100):
            content[position] ^= 0xFF
    path.write_bytes(
        {"cut in half": content[: len(content) // 2], "empty": b""}.get(damage, content)
    )
    with _refused("a.parquet", value="end", constraint="read", remedy="replace"):
        _locations_and_texts([str(path)], 1 << 30)


@pytest.mark.parametrize("is_dictionary", [False, True])
def test_texts_that_do_not_lie_in_their_batch_are_refused(
    tmp_path: Path, is_dictionary: bool
) -> None:
    """pyarrow itself would return other text for them."""
    texts = pyarrow.array(["four", "is", "a", "number"])
    values = texts.dictionary_encode() if is_dictionary else texts
    path = tmp_path / "a.arrow"
    with pyarrow.ipc.new_stream(path, pyarrow.schema([("text", values.type)])) as writer:
        writer.write_batch(pyarrow.record_batch([values], ["text"]))
    content, offsets = path.read_bytes(), struct.pack("<5i", 0, 4, 6, 7, 13)
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, struct.pack("<5i", 0, 7, 6, 7, 13)))
    with _refused("a.arrow", value="", constraint="read", remedy="replace"):
        list(read_rows(path, "arrow", "text", begin=0, end=1))
