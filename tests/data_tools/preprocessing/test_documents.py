from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import zstandard

from data_tools.errors import DataError
from data_tools.preprocessing import documents
from data_tools.preprocessing.documents import (
    BadDocumentError,
    DocumentReader,
    RawDocument,
    batch_documents,
    extract_text,
)
from data_tools.preprocessing.inputs import Source, cut_pieces
from tests.refusals import assert_refused

_bad = partial(assert_refused, error=BadDocumentError)

_refused = partial(assert_refused, error=BadDocumentError)

_PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def _reader(
    *files: Path, piece_bytes: int = 1 << 30, max_bytes: int | None = None
) -> DocumentReader:
    pieces = cut_pieces([Source("", list(files))], piece_bytes=piece_bytes, json_key="text")
    return DocumentReader(pieces, json_key="text", max_bytes=max_bytes)


def _lines(count: int) -> bytes:
    return b"".join(json.dumps({"text": f"document {i}"}).encode() + b"\n" for i in range(count))


@pytest.mark.parametrize("packing", _PACKINGS)
def test_compressed_files_hold_the_same_documents(tmp_path: Path, packing: str) -> None:
    pack = _PACKINGS[packing]
    files = [tmp_path / f"a.jsonl{packing}", tmp_path / f"b.txt{packing}"]
    files[0].write_bytes(pack(_lines(2000)))
    files[1].write_bytes(pack(b"one\ntwo\n"))
    reader = _reader(*files)
    found = list(reader)
    texts = [extract_text(document, json_key="text") for document in found]
    assert texts == [*(f"document {i}" for i in range(2000)), "one\ntwo\n"]
    assert found[7].location == f"{files[0]}:8"
    assert found[-1].location == str(files[1])
    assert reader.bytes_read == reader.total_bytes == sum(f.stat().st_size for f in files)


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_files_of_several_frames_are_read_to_their_end(tmp_path: Path, packing: str) -> None:
    pack = _PACKINGS[packing]
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(pack(_lines(3)) + pack(b"") + pack(_lines(2)))
    assert len(list(_reader(path))) == 5


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut in half", "last byte cut", "garbage behind", "not packed"])
def test_damaged_compressed_file_is_an_error_never_a_shorter_corpus(
    tmp_path: Path, packing: str, damage: str
) -> None:
    packed = _PACKINGS[packing](_lines(50_000))
    content = {
        "cut in half": packed[: len(packed) // 2],
        "last byte cut": packed[:-1],
        "garbage behind": packed + b"garbage",
        "not packed": _lines(10),
    }[damage]
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(content)
    with assert_refused(
        path.name, value="byte", constraint="end", remedy="replace", error=DataError
    ):
        list(_reader(path))


def test_blank_lines_are_no_documents_and_the_last_line_needs_no_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\r\n\n  \n{"text": "b"}')
    found = list(_reader(path))
    assert [extract_text(document, json_key="text") for document in found] == ["a", "b"]
    assert [document.line for document in found] == [1, 4]


@pytest.mark.parametrize(
    ("data", "value", "constraint"),
    [
        (b'{"text": "a"', "JSON", "valid"),
        (b"[" * 100_000, "JSON", "recursion"),
        (b"[1]", "list", "object"),
        (b'{"content": "a"}', "'text'", "'content'"),
        (b'{"text": 5}', "'text'", "int"),
        (b'{"text": null}', "'text'", "NoneType"),
        (b'{"text": "\\ud800"}', "'text'", "surrogate"),
        (b'{"text": "\xff"}', 10, "UTF-8"),
    ],
)
def test_bad_line_is_refused_with_file_and_line(
    data: bytes, value: object, constraint: str
) -> None:
    with _bad("a.jsonl:7", value, constraint, remedy="--on-bad-line"):
        extract_text(RawDocument("a.jsonl", 7, data, is_json=True), json_key="text")


def test_text_file_that_is_not_utf8_is_refused() -> None:
    with _refused("a.txt", value=1, constraint="UTF-8", remedy="--on-bad-line"):
        extract_text(RawDocument("a.txt", None, b"a\xff"), json_key="text")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("piece_bytes", [1 << 30, 1 << 18])
def test_line_larger_than_the_limit_is_passed_over(
    tmp_path: Path, suffix: str, piece_bytes: int
) -> None:
    path = tmp_path / f"a{suffix}"
    data = b'{"text": "one"}\n' + b"x" * (5 << 20) + b'\n{"text": "three"}\n'
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    one, two, three = _reader(path, piece_bytes=piece_bytes, max_bytes=1 << 20)
    assert [extract_text(document, json_key="text") for document in (one, three)] == [
        "one",
        "three",
    ]
    assert (two.data, two.too_large) == (b"", True)
    with _bad(f"{path}:2", value=1, constraint="MiB", remedy=("split", "--max-document-megabytes")):
        extract_text(two, json_key="text", max_bytes=1 << 20)
    assert [len(each.data) for each in _reader(path, piece_bytes=piece_bytes)][1] == (5 << 20) + 1


def test_text_file_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 101)
    [document] = _reader(tmp_path / "a.txt", max_bytes=100)
    with _refused(
        "a.txt", value=16, constraint="MiB", remedy=("--max-document-megabytes", "--on-bad-line")
    ):
        extract_text(document, json_key="text")


def test_batches_keep_order_and_bound_their_size() -> None:
    small = [RawDocument("a", i, b"x") for i in range(3000)]
    large = [RawDocument("b", i, bytes(600_000)) for i in range(4)]
    batches = list(batch_documents([*small, *large]))
    assert [document for batch in batches for document in batch] == [*small, *large]
    assert max(map(len, batches)) == 1024
    assert max(sum(len(document.data) for document in batch) for batch in batches) < 1_700_000


def test_memory_of_a_compressed_file_does_not_grow_with_its_size() -> None:
    reader = documents._ZstdReader(io.BytesIO(_PACKINGS[".zst"](bytes(1 << 26))))
    largest, total = 0, 0
    while data := reader.read(1 << 16):
        total += len(data)
        largest = max(largest, len(reader._decompressed))
    assert total == 1 << 26
    assert largest < 1 << 26


_VALUES = [
    '"plain"',
    '"\\u00e9 \\ud83d\\ude00 \\n"',
    '""',
    "5",
    "null",
    '{"text": "inner"}',
    '"' + "long " * 5000 + '"',
    '"\\ud800"',  # a lone surrogate
    '"a\tb"',  # a control character
    "1e999",
    "NaN",
    str(10**40),
    "[" * 500 + "]" * 500,
]


def _lines_of_two_fields() -> list[str]:
    orders = ('{{"text": {0}, "other": {1}}}', '{{"other": {1}, "text": {0}}}', '{{"text": {1}}}')
    twice = ('{{"text": {0}, "text": {1}}}', "{0}", "{{{0}}}", ' {{"text": {0}}} \r\n', "\ufeff{0}")
    return [each.format(a, b) for each in (*orders, *twice) for a in _VALUES for b in _VALUES]


def test_lines_are_read_as_json_reads_them() -> None:
    for line in _lines_of_two_fields():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        text = record.get("text") if isinstance(record, dict) else None
        document = RawDocument("a.jsonl", 1, line.encode(), is_json=True)
        if isinstance(text, str) and "\ud800" not in text:
            assert extract_text(document, json_key="text") == text
        else:
            with pytest.raises(BadDocumentError):
                extract_text(document, json_key="text")
