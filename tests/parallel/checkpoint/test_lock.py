"""A run directory of a start that was refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.lock import RunLock


def test_a_directory_into_which_nothing_came_is_not_left(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    lock.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["config.yaml", "checkpoints/latest"])
def test_a_directory_with_a_file_stays_as_it_is(name: str, tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run")
    file = tmp_path / "run" / name
    (tmp_path / "run" / "checkpoints").mkdir()
    file.write_text("text")
    lock.release()
    assert file.is_file()
    assert (tmp_path / "run" / "checkpoints").is_dir()
    assert (tmp_path / "run" / "run.lock").is_file()


def test_a_directory_that_was_there_stays(tmp_path: Path) -> None:
    RunLock(tmp_path).release()
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_a_directory_whose_lock_was_taken_away_stays(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run")
    (tmp_path / "run" / "run.lock").unlink()
    other = RunLock(tmp_path / "run")
    lock.release()
    assert other.is_held()
    assert (tmp_path / "run" / "run.lock").is_file()
    other.release()


def test_a_lock_that_another_holds_does_not_remove_it(tmp_path: Path) -> None:
    held = RunLock(tmp_path / "run")
    assert held.is_held()
    with pytest.raises(CheckpointError):
        RunLock(tmp_path / "run" / "run.lock")
    assert held.is_held()
    held.release()
