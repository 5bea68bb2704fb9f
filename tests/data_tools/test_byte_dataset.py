from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from data_tools.byte_dataset import BYTE_EOD, ByteStream, expand_paths
from data_tools.errors import DataError


def _write_files(folder: Path, contents: dict[str, bytes]) -> list[Path]:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return [folder / name for name in contents]


def test_stream_is_the_bytes_of_each_file_and_an_end_token(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    contents = [generator.bytes(size) for size in (5, 0, 1, 300, 2)]
    files = _write_files(tmp_path, {f"{i}.bin": c for i, c in enumerate(contents)})
    expected = np.concatenate([[*content, BYTE_EOD] for content in contents if content])
    stream = ByteStream(files)
    assert stream.num_tokens == len(expected)
    assert stream.num_bytes == sum(map(len, contents))
    for length in (1, 2, 9, len(expected)):
        starts = np.arange(len(expected) - length + 1)
        windows = np.lib.stride_tricks.sliding_window_view(expected, length)
        assert np.array_equal(stream.read(starts, length), windows)


def test_documents_start_behind_every_end_token(tmp_path: Path) -> None:
    stream = ByteStream(_write_files(tmp_path, {"a": b"12", "b": b"3", "c": b"4567"}))
    ids = stream.read(np.array([0]), stream.num_tokens)[0]
    expected = [int(p) + 1 for p in np.flatnonzero(ids == BYTE_EOD)[:-1]]
    assert stream.document_starts(np.array([0]), stream.num_tokens)[0].tolist() == expected
    assert [p.tolist() for p in stream.document_starts(np.array([2, 3]), 3)] == [[3], [5]]


def test_more_files_than_may_be_open_are_read(tmp_path: Path) -> None:
    files = _write_files(tmp_path, {f"{i:04}": b"%04d" % i for i in range(400)})
    stream = ByteStream(files)
    before = len(os.listdir("/proc/self/fd"))
    ids = stream.read(np.arange(400) * 5, 4)
    assert ids.astype(np.uint8).tobytes() == b"".join(b"%04d" % i for i in range(400))
    assert len(os.listdir("/proc/self/fd")) - before <= 128


def test_file_that_changed_size_while_in_use_is_refused(tmp_path: Path) -> None:
    files = _write_files(tmp_path, {"a": b"12345"})
    stream = ByteStream(files)
    files[0].write_bytes(b"123")
    with pytest.raises(DataError, match="a: 3 bytes found, 5 when the run started"):
        stream.read(np.array([0]), 3)


def test_fingerprint_follows_names_and_contents_not_the_folder(tmp_path: Path) -> None:
    variants = [
        {"here/a": b"xyz", "here/b": b"1"},
        {"there/a": b"xyz", "there/b": b"1"},
        {"renamed/c": b"xyz", "renamed/b": b"1"},
        {"edited/a": b"xyY", "edited/b": b"1"},
    ]
    prints = [ByteStream(_write_files(tmp_path, files)).fingerprint for files in variants]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


@pytest.mark.parametrize("contents", [{}, {"a": b""}])
def test_source_without_bytes_is_refused(tmp_path: Path, contents: dict[str, bytes]) -> None:
    with pytest.raises(DataError, match="files of a byte source hold no byte"):
        ByteStream(_write_files(tmp_path, contents))


def test_paths_directories_and_globs_expand_to_sorted_files(tmp_path: Path) -> None:
    files = _write_files(tmp_path, {"b.txt": b"", "a.md": b"", "deep/c.txt": b"", ".hidden": b""})
    b, a, c, _ = files
    assert expand_paths(str(b)) == [b]
    assert expand_paths(str(tmp_path)) == [a, b, c]
    assert expand_paths(str(tmp_path), suffixes=(".txt",)) == [b, c]
    assert expand_paths(str(tmp_path / "**" / "*.txt")) == [b, c]


@pytest.mark.parametrize("pattern", ["missing", "missing/*.txt", "empty"])
def test_path_without_files_is_refused(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no such file, or nothing in it; check the path"):
        expand_paths(str(tmp_path / pattern))
