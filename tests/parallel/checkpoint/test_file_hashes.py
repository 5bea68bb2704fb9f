"""Files are hashed side by side, in order, and errors belong to their file."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.checkpoint import file_hashes
from parallel.checkpoint.file_hashes import hash_files


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.bin" for number in range(7)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * (100_000 - 9_000 * number))
    return paths


@pytest.mark.parametrize("threads", [1, 3, 20, None])
def test_checksums_come_in_the_order_of_the_files(threads, paths):
    found = list(hash_files(iter(paths), threads=threads))
    assert [each.path for each in found] == paths
    for path, record, error in found:
        assert error is None
        assert record == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


def test_files_are_hashed_at_a_time(paths, monkeypatch):
    """All of a window are begun before the first has to end."""
    together, usual = threading.Barrier(3, timeout=60), file_hashes.file_record

    def record(path: Path):
        together.wait()
        return usual(path)

    monkeypatch.setattr(file_hashes, "file_record", record)
    assert len(list(hash_files(paths[:6], threads=3))) == 6


def test_a_path_is_taken_when_its_file_is_begun_and_none_after_the_reader_has_stopped(paths):
    taken: list[Path] = []

    def listed() -> Iterator[Path]:
        for path in paths:
            taken.append(path)
            yield path

    hashed = hash_files(listed(), threads=2)
    assert taken == []
    next(hashed)
    assert taken == paths[:2]
    hashed.close()
    assert taken == paths[:2]


def test_a_file_that_cannot_be_read_is_an_error_of_its_own(paths):
    paths[2].unlink()
    found = list(hash_files(paths, threads=4))
    assert [each.record is None for each in found] == [number == 2 for number in range(7)]
    assert isinstance(found[2].error, FileNotFoundError)
