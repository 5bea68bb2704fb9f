from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_tools.corpus.byte_dataset import ByteStream, MappedFiles
from data_tools.errors import DataError
from data_tools.files import expand_paths
from data_tools.tokenization.byte_vocabulary import BYTE_EOD
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)


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
    stream = ByteStream(MappedFiles(files))
    assert stream.num_tokens == len(expected)
    assert stream.num_bytes == sum(map(len, contents))
    for length in (1, 2, 9, len(expected)):
        starts = np.arange(len(expected) - length + 1)
        windows = np.lib.stride_tricks.sliding_window_view(expected, length)
        assert np.array_equal(stream.read(starts, length), windows)


def test_documents_start_behind_every_end_token(tmp_path: Path) -> None:
    stream = ByteStream(MappedFiles(_write_files(tmp_path, {"a": b"12", "b": b"3", "c": b"4567"})))
    ids = stream.read(np.array([0]), stream.num_tokens)[0]
    expected = [int(p) + 1 for p in np.flatnonzero(ids == BYTE_EOD)[:-1]]
    assert stream.document_starts(np.array([0]), stream.num_tokens)[0].tolist() == expected
    assert [p.tolist() for p in stream.document_starts(np.array([2, 3]), 3)] == [[3], [5]]


def _split_at_blank_lines(content: bytes) -> list[int]:
    """Line by line: text after a blank line begins a document, if a line came before."""
    ids: list[int] = []
    blank = False
    for line in content.splitlines(keepends=True) if content else []:
        is_blank = line in (b"\n", b"\r\n")
        if blank and not is_blank:
            ids[-1] = BYTE_EOD
        blank = is_blank and bool(ids)
        ids += line
    return [*ids, BYTE_EOD]


@pytest.mark.parametrize("seed", range(20))
def test_blank_lines_separate_documents_wherever_a_window_begins(tmp_path: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    parts = [b"\n", b"\n", b"\r\n", b"a", b"bc", b"\x00", b"\xff"]
    contents = [b"".join(generator.choice(parts, size=30)) for _ in range(3)]
    files = _write_files(tmp_path, {f"{i}": c for i, c in enumerate(contents)})
    # splitlines would also break at a lone carriage return, which these contents do not have.
    expected = np.concatenate([_split_at_blank_lines(content) for content in contents])
    stream = ByteStream(MappedFiles(files), blank_lines=True)
    assert (expected[:-1] == BYTE_EOD).sum() > len(files)
    for length in (1, 2, 3, 7, len(expected)):
        starts = np.arange(len(expected) - length + 1)
        windows = np.lib.stride_tricks.sliding_window_view(expected, length)
        assert np.array_equal(stream.read(starts, length), windows)
    starts = stream.document_starts(np.array([0]), stream.num_tokens)[0]
    assert starts.tolist() == [int(p) + 1 for p in np.flatnonzero(expected[:-1] == BYTE_EOD)]


def test_any_bytes_are_trained_on_as_they_are(tmp_path: Path) -> None:
    content = bytes(range(256)) + b"\x00" * 50 + b"\xc3\x28\xff\xfe" + bytes(range(255, -1, -1))
    stream = ByteStream(MappedFiles(_write_files(tmp_path, {"binary": content})))
    assert stream.read(np.array([0]), len(content) + 1)[0].tolist() == [*content, BYTE_EOD]


def test_a_file_of_more_than_two_to_the_31_bytes_is_read_at_its_end(tmp_path: Path) -> None:
    size = (1 << 31) + 12_345
    with open(tmp_path / "large", "wb") as file:
        file.truncate(size)
        file.seek(size - 3)
        file.write(b"end")
    stream = ByteStream(MappedFiles([tmp_path / "large"]), blank_lines=True)
    assert stream.num_tokens == size + 1
    assert stream.read(np.array([size - 4]), 5)[0].tolist() == [0, *b"end", BYTE_EOD]


def test_more_files_than_may_be_open_are_read(tmp_path: Path) -> None:
    files = _write_files(tmp_path, {f"{i:04}": b"%04d" % i for i in range(400)})
    stream = ByteStream(MappedFiles(files))
    before = len(os.listdir("/proc/self/fd"))
    ids = stream.read(np.arange(400) * 5, 4)
    assert ids.astype(np.uint8).tobytes() == b"".join(b"%04d" % i for i in range(400))
    assert len(os.listdir("/proc/self/fd")) - before <= 128


def test_file_that_changed_size_while_in_use_is_refused(tmp_path: Path) -> None:
    files = _write_files(tmp_path, {"a": b"12345"})
    stream = ByteStream(MappedFiles(files))
    files[0].write_bytes(b"123")
    with _refused(str(tmp_path / "a"), value=3, constraint="5", remedy="change"):
        stream.read(np.array([0]), 3)


def test_fingerprint_follows_names_and_contents_not_the_folder(tmp_path: Path) -> None:
    variants = [
        {"here/a": b"xyz", "here/b": b"1"},
        {"there/a": b"xyz", "there/b": b"1"},
        {"renamed/c": b"xyz", "renamed/b": b"1"},
        {"edited/a": b"xyY", "edited/b": b"1"},
    ]
    prints = [
        ByteStream(MappedFiles(_write_files(tmp_path, files))).fingerprint for files in variants
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_fingerprint_sees_a_changed_byte_far_behind_the_beginning(tmp_path: Path) -> None:
    content = bytearray(300_000)
    before = MappedFiles(_write_files(tmp_path / "a", {"f": bytes(content)})).fingerprint
    content[250_000] = 1
    assert MappedFiles(_write_files(tmp_path / "b", {"f": bytes(content)})).fingerprint != before


@pytest.mark.parametrize("contents", [{}, {"a": b""}])
def test_source_without_bytes_is_refused(tmp_path: Path, contents: dict[str, bytes]) -> None:
    with _refused("data.train", value=len(contents), constraint="text", remedy="path"):
        ByteStream(MappedFiles(_write_files(tmp_path, contents)))


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
    with _refused(pattern, value="no such file", constraint="nothing", remedy="path"):
        expand_paths(str(tmp_path / pattern))
