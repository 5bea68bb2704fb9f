"""A run directory of a start that was refused."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.checkpoint import lock as lock_module
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


_HOLDER = """
import fcntl, os, sys
fcntl.lockf(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_new_directory_that_another_process_locks_first_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run" / "run.lock"
    holders: list[subprocess.Popen[bytes]] = []

    def other_process_comes(_: Path) -> None:  # after the directory is made, before it is locked
        if not holders:
            command = [sys.executable, "-c", _HOLDER, str(path)]
            pipe = subprocess.PIPE
            holders.append(subprocess.Popen(command, stdin=pipe, stdout=pipe))
            assert holders[0].stdout is not None
            assert holders[0].stdout.readline() == b"held\n"

    monkeypatch.setattr(lock_module, "refuse_if_others_can_write", other_process_comes)
    try:
        with pytest.raises(CheckpointError):
            RunLock(tmp_path / "run")
        assert path.is_file()
    finally:
        for holder in holders:
            holder.communicate()


def test_a_lock_of_a_file_that_was_removed_before_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lockf = fcntl.lockf

    def after_the_last_owner(descriptor: int, operation: int) -> None:
        (tmp_path / "run" / "run.lock").unlink()
        lockf(descriptor, operation)

    monkeypatch.setattr(fcntl, "lockf", after_the_last_owner)
    with pytest.raises(CheckpointError):
        RunLock(tmp_path / "run")
