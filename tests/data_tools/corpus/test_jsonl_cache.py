from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.config import DataConfig
from data_tools.corpus.byte_dataset import MappedFiles
from data_tools.corpus.jsonl_cache import JsonlCache, open_jsonl, verify_caches
from data_tools.corpus.jsonl_stream import JsonlStream
from data_tools.corpus.token_stream import TokenStream
from data_tools.errors import DataError
from tests.distributed import run_ranks
from tests.refusals import assert_refused

_TEXTS = ["plain", "", 'two\nlines "quoted" \\ \t', "\u00e9 \U0001f600 \x00 \u00ff", "x" * 300, "z"]


def _files(folder: Path, num_files: int = 2) -> MappedFiles:
    paths = []
    for number in range(num_files):
        paths.append(folder / f"{number}.jsonl")
        lines = [json.dumps({"text": f"{text}{number}" if text else ""}) for text in _TEXTS]
        paths[-1].write_text("\n\n".join(lines) + "\n" * number)
    return MappedFiles(paths)


def _open(files: MappedFiles, cache: Path) -> TokenStream:
    return open_jsonl(files, json_key="text", cache_dir=str(cache))


def _images(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/text"))


def _same(first: TokenStream, second: TokenStream) -> bool:
    assert first.fingerprint == second.fingerprint
    assert (first.num_tokens, first.num_bytes) == (second.num_tokens, second.num_bytes)
    everything = [stream.read(np.array([0]), stream.num_tokens)[0] for stream in (first, second)]
    assert everything[0].dtype == everything[1].dtype
    return np.array_equal(*everything)


@pytest.mark.parametrize("num_files", [1, 2, 3])
def test_cache_holds_the_tokens_of_the_parsed_stream(tmp_path: Path, num_files: int) -> None:
    files = _files(tmp_path, num_files)
    image, parsed = _open(files, tmp_path / "cache"), JsonlStream(files, json_key="text")
    assert isinstance(image, JsonlCache)
    assert _same(image, parsed)
    for length in (1, 2, 9, 100):
        starts = np.arange(parsed.num_tokens - length + 1)
        assert np.array_equal(image.read(starts, length), parsed.read(starts, length))
    for place in range(parsed.num_tokens):
        assert image.document_at(place) == parsed.document_at(place)
    begins = np.array([0, 3])
    found, expected = (s.document_starts(begins, 300) for s in (image, parsed))
    assert all(map(np.array_equal, found, expected))


def test_cache_is_built_once_and_again_when_a_file_changes(tmp_path: Path) -> None:
    files = _files(tmp_path)
    _open(files, tmp_path / "cache")
    [image] = _images(tmp_path / "cache")
    made = os.stat(image).st_ino
    _open(MappedFiles(files.paths), tmp_path / "cache")
    assert [os.stat(each).st_ino for each in _images(tmp_path / "cache")] == [made]
    content = files.paths[0].read_text().replace("plain", "other")
    files.paths[0].write_text(content)
    os.utime(files.paths[0], ns=(0, 1))
    changed = MappedFiles(files.paths)
    assert _same(_open(changed, tmp_path / "cache"), JsonlStream(changed, json_key="text"))
    assert len(_images(tmp_path / "cache")) == 2
    assert len(list(tmp_path.glob("cache/*/*"))) == 4  # an image and a lock each


def test_ranks_share_one_cache(tmp_path: Path) -> None:
    files = _files(tmp_path)
    folder = tmp_path / "cache"
    sizes = run_ranks(_num_tokens, 4, [str(path) for path in files.paths], str(folder), init=False)
    assert set(sizes) == {JsonlStream(files, json_key="text").num_tokens}
    assert len(_images(folder)) == 1


def _num_tokens(paths: list[str], folder: str) -> int:
    return _open(MappedFiles([Path(path) for path in paths]), Path(folder)).num_tokens


@pytest.mark.parametrize("why", ["no folder", "no space"])
def test_without_a_cache_lines_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    files = _files(tmp_path)
    if why == "no folder":
        (tmp_path / "cache").write_text("in the way")
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    stream = _open(files, tmp_path / "cache")
    assert isinstance(stream, JsonlStream)
    assert "lines are parsed on every read, which is slower: set data.cache_dir" in caplog.text


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{}", ("0.jsonl:2", "'text'", "text", "data.json_key")),
        ("", ("0.jsonl", 0, "'text'", ("data.train", "data.json_key"))),
    ],
)
def test_bad_file_leaves_no_cache(tmp_path: Path, line: str, parts: tuple) -> None:
    (tmp_path / "0.jsonl").write_text('{"text": ""}\n' + line)
    with assert_refused(*parts, error=DataError):
        _open(MappedFiles([tmp_path / "0.jsonl"]), tmp_path / "cache")
    assert [path.name for path in tmp_path.glob("cache/*/*")] == ["lock"]


@pytest.mark.parametrize("documents", ["jsonl", "file"])
def test_cache_dir_is_taken_where_it_has_an_effect(documents: str) -> None:
    settings: dict[str, Any] = {"kind": "bytes", "documents": documents}
    settings |= {"train": "a", "sequence_length": 8, "cache_dir": "cache"}
    if documents == "jsonl":
        assert DataConfig.model_validate(settings).cache_dir == "cache"
    else:
        with assert_refused(
            "data.cache_dir", value="cache", constraint=("URL", ".jsonl"), remedy="remove"
        ):
            DataConfig.model_validate(settings)


def test_every_flipped_bit_of_a_cache_is_found(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    _open(_files(tmp_path, 1), cache)
    (image,) = _images(cache)
    assert list(verify_caches(str(cache))) == [image]
    content = image.read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        image.write_bytes(damaged)
        with assert_refused(
            str(image), value="damaged", constraint="text", remedy="delete", error=DataError
        ):
            list(verify_caches(str(cache)))


def test_a_truncated_cache_is_not_opened(tmp_path: Path) -> None:
    files = _files(tmp_path, 1)
    _open(files, tmp_path / "cache")
    (image,) = _images(tmp_path / "cache")
    content = image.read_bytes()
    for size in range(len(content)):
        image.write_bytes(content[:size])
        with pytest.raises(DataError, match=rf"{image}: "):
            _open(files, tmp_path / "cache")
