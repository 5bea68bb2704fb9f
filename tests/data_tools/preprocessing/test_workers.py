from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.errors import DataError
from data_tools.preprocessing.workers import ProgressDelta, run_tasks
from tests.refusals import assert_refused


def _write(path: Path) -> Iterator[ProgressDelta]:
    yield ProgressDelta(1, 10)
    path.write_text("done")
    yield ProgressDelta(0, 5)


def _fail(text: str) -> Iterator[ProgressDelta]:
    yield ProgressDelta(int(text), 0)


def _die(status: int) -> Iterator[ProgressDelta]:
    os._exit(status)
    yield ProgressDelta(0, 0)


_WORKERS = pytest.mark.parametrize(
    ("num_workers", "in_threads"),
    [(1, False), (2, False), (2, True)],
    ids=["here", "processes", "threads"],
)


@_WORKERS
def test_every_task_runs_and_progress_adds_up(
    tmp_path: Path, num_workers: int, in_threads: bool
) -> None:
    reports: list[tuple[int, int]] = []
    paths = [tmp_path / str(i) for i in range(20)]
    run_tasks(
        _write,
        paths,
        num_workers=num_workers,
        report=lambda *done: reports.append(done),
        in_threads=in_threads,
    )
    assert all(path.exists() for path in paths)
    assert reports[-1] == (20, 300)
    assert reports == sorted(reports)


@_WORKERS
def test_error_of_a_task_is_raised_here(num_workers: int, in_threads: bool) -> None:
    with pytest.raises(ValueError, match="invalid literal for int"):
        run_tasks(
            _fail,
            ["1", "one"],
            num_workers=num_workers,
            report=lambda *_: None,
            in_threads=in_threads,
        )


def test_an_error_stops_the_tasks_of_other_threads(tmp_path: Path) -> None:
    def task(path: Path) -> Iterator[ProgressDelta]:
        if path.name == "bad":
            raise DataError("bad")
        try:
            while True:
                time.sleep(0.01)
                yield ProgressDelta(0, 1)
        finally:
            path.write_text("cleaned up")

    paths = [tmp_path / "good", tmp_path / "bad"]
    with pytest.raises(DataError, match="bad"):
        run_tasks(task, paths, num_workers=2, report=lambda *_: None, in_threads=True)
    assert paths[0].read_text() == "cleaned up"


def test_worker_that_dies_is_reported_in_one_line() -> None:
    with assert_refused(
        "one", value=2, constraint=("died", "memory"), remedy="--workers", error=DataError
    ):
        run_tasks(_die, [1], num_workers=2, report=lambda *_: None)


_FOREVER = """
import os, time
from pathlib import Path
from data_tools.preprocessing.workers import run_tasks

def work(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)
    yield

if __name__ == "__main__":
    run_tasks(work, {paths!r}, num_workers=2, report=print)
"""


def test_workers_of_a_killed_parent_die_with_it(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    program = tmp_path / "program.py"
    program.write_text(_FOREVER.format(paths=[str(path) for path in paths]))
    parent = subprocess.Popen([sys.executable, str(program)], env={**os.environ, "PYTHONPATH": "."})
    while not all(path.exists() and path.read_text() for path in paths):
        time.sleep(0.05)
        assert parent.poll() is None
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    workers = [int(path.read_text()) for path in paths]
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)
