"""Saves of two ranks that end before one of their storage operations."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.checkpoint.storage import Storage
from pretrain.checkpoint import main
from pretrain.distributed.consensus import RankGroup
from tests.distributed import run_ranks
from tests.pretrain.checkpointing.fixtures import assert_holds, contents, open_store

RANKS = (0, 1)


def save(run_dir: Path, step: int, victim: int | None, point: int) -> int:
    """Both ranks save; `victim` dies before its storage operation `point`. How many there were."""
    ranks = RankGroup.of_world(timeout=None)
    count = 0

    def hook(operation: str, path: Path) -> None:
        nonlocal count
        if ranks.rank == victim and count == point:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    storage = Storage(hook=hook)
    store = open_store(run_dir, keep=1, ranks=ranks, storage=storage)
    store.find("auto")
    store.save(contents(step, ranks=ranks, storage=storage))
    store.close()
    return count


def assert_nothing_torn(run_dir: str | Path) -> None:
    """Whatever bears the name of a checkpoint is one."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["verify", str(run_dir)]) == 0


def every_point(points: list[int]) -> Iterator[tuple[int, int]]:
    yield from ((rank, point) for rank in RANKS for point in range(points[rank]))


def crash_everywhere(folder: Path) -> tuple[list[int], tuple[list[int], list[int]]]:
    """Crash the second save of a run at each of its points, in copies of the run.

    The number of points of each rank; and by rank the steps of the checkpoints that were found
    afterwards, complete and with the content of their step.
    """
    run_ranks(save, 2, folder / "begun", 1, None, 0)
    shutil.copytree(folder / "begun", folder / "whole")
    points = run_ranks(save, 2, folder / "whole", 2, None, 0)
    found_steps: tuple[list[int], list[int]] = ([], [])
    for rank, point in every_point(points):
        run_dir = folder / f"rank_{rank}_{point}"
        shutil.copytree(folder / "begun", run_dir)
        with pytest.raises(AssertionError, match=f"rank {rank}: exit -9"):
            run_ranks(save, 2, run_dir, 2, rank, point)
        assert_nothing_torn(run_dir)
        store = open_store(run_dir)
        found = store.find("must")
        store.close()
        assert found is not None
        assert_holds(found, found.step, num_ranks=2)
        found_steps[rank].append(found.step)
    return points, found_steps
