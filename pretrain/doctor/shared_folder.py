"""Several nodes examine together: each must see the files of the others.

Every task writes a probe file, waits until it sees those of all tasks, says so in its own, and
removes it once all others have said so or are gone: whoever has removed his has seen that of all.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pretrain.doctor.findings import Finding

SECTION = "shared folder"
_TICK = 0.05  # seconds
_SEEN = b"seen"


class Task(NamedTuple):
    """This task of a step of Slurm, which runs on several nodes."""

    rank: int
    size: int
    name: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Task | None:
        """The task that srun started; None for a single process."""
        values = [
            environment.get(name, "")
            for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "SLURM_STEP_ID")
        ]
        if not all(value.isdecimal() for value in values) or int(values[1]) < 2:
            return None
        return cls(int(values[0]), int(values[1]), f"{values[2]}-{values[3]}")


def check_shared_folder(folder: Path, task: Task, *, patience: float) -> Iterator[Finding]:
    """Check that all tasks see one folder; waits at most `patience` seconds for each phase."""
    paths = [folder / f".doctor-{task.name}-{rank}" for rank in range(task.size)]
    own = paths[task.rank]
    try:
        own.write_bytes(socket.gethostname().encode())
        missing = _wait(lambda path: path.exists(), paths, folder, patience)
        if missing:
            yield _not_shared(folder, task, missing)
            return
        with own.open("ab") as file:
            file.write(_SEEN)
        _wait(lambda path: not path.exists() or _has_seen(path), paths, folder, patience)
    finally:
        own.unlink(missing_ok=True)
    yield Finding(SECTION, "ok", f"{folder}: all {task.size} tasks see each other's files")


def _has_seen(path: Path) -> bool:
    try:
        return path.read_bytes().endswith(_SEEN)
    except FileNotFoundError:
        return True


def _wait(
    is_there: Callable[[Path], bool], paths: list[Path], folder: Path, patience: float
) -> list[int]:
    """Wait for all files; returns the ranks whose file did not come."""
    end = time.monotonic() + patience
    while True:
        os.listdir(folder)  # lets a network file system look again for files it has not seen
        missing = [rank for rank, path in enumerate(paths) if not is_there(path)]
        if not missing or time.monotonic() > end:
            return missing
        time.sleep(_TICK)


def _not_shared(folder: Path, task: Task, missing: list[int]) -> Finding:
    return Finding(
        SECTION,
        "error",
        f"{socket.gethostname()} does not see in {folder} what tasks "
        f"{', '.join(map(str, missing))} of {task.size} wrote there",
        "set run_dir to a folder that all nodes share",
    )
