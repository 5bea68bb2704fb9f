from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.corpus.byte_dataset import MappedFiles
from data_tools.corpus.jsonl_stream import JsonlStream
from data_tools.errors import DataError
from data_tools.tokenization.byte_vocabulary import BYTE_EOD
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)

_TEXTS = ["plain", "", 'two\nlines "quoted" \\ \t', "\u00e9 \U0001f600 \x00", "x" * 300, "last"]


def _stream(folder: Path, *files: list[Any], json_key: str = "text") -> JsonlStream:
    paths = []
    for number, records in enumerate(files):
        path = folder / f"{number}.jsonl"
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        path.write_bytes(b"".join(line.encode() + b"\n" for line in lines))
        paths.append(path)
    return JsonlStream(MappedFiles(paths), json_key=json_key)


def test_stream_is_the_text_of_every_line_and_an_end_token(tmp_path: Path) -> None:
    records = [{"id": i, "body": text} for i, text in enumerate(_TEXTS)]
    raw = json.dumps(records[3], ensure_ascii=False)
    files = ([*records[:3], "", "  "], [raw, *records[4:]])
    stream = _stream(tmp_path, *files, json_key="body")
    expected = np.concatenate([[*text.encode(), BYTE_EOD] for text in _TEXTS if text])
    assert stream.num_tokens == len(expected)
    assert stream.num_bytes == sum(len(text.encode()) for text in _TEXTS)
    for length in (1, 2, 9, 100, len(expected)):
        starts = np.arange(len(expected) - length + 1)
        windows = np.lib.stride_tricks.sliding_window_view(expected, length)
        assert np.array_equal(stream.read(starts, length), windows)
    starts = stream.document_starts(np.array([0]), stream.num_tokens)[0]
    assert starts.tolist() == [int(p) + 1 for p in np.flatnonzero(expected[:-1] == BYTE_EOD)]


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ({"body": "x"}, "'text'"),
        ({"text": 3}, "'text'"),
        ("[1, 2]", "'text'"),
        ("{not json", "JSON"),
        ('{"text": "\\ud800"}', "JSON"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_unusable_line_is_refused_with_file_and_number(tmp_path: Path, bad: Any, what: str) -> None:
    with _refused("0.jsonl:3", value=what, constraint="text", remedy=("repair", "data.json_key")):
        _stream(tmp_path, [{"text": "fine"}, "", bad])


def test_invalid_utf8_is_refused_with_file_and_number(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with _refused(
        "f.jsonl:2", value="JSON", constraint=("text", "0xff"), remedy=("repair", "data.json_key")
    ):
        JsonlStream(MappedFiles([tmp_path / "f.jsonl"]), json_key="text")


def test_files_without_text_are_refused(tmp_path: Path) -> None:
    with _refused("0.jsonl", value=1, constraint="'text'", remedy=("data.train", "data.json_key")):
        _stream(tmp_path, [{"text": ""}], [""])


def test_file_changed_in_use_is_refused(tmp_path: Path) -> None:
    stream = _stream(tmp_path, [{"text": "12345"}, {"text": "67"}])
    (tmp_path / "0.jsonl").write_bytes((tmp_path / "0.jsonl").read_bytes().replace(b"67", b'"}'))
    with _refused("0.jsonl", value=18, constraint="JSON", remedy="data.json_key"):
        stream.read(np.array([0]), stream.num_tokens)


def test_the_key_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    records = [{"a": "x", "b": "y"}]
    first, second = (_stream(tmp_path, records, json_key=key).fingerprint for key in "ab")
    assert first != second
