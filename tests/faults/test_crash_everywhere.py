"""A save of two ranks, ended at each of its storage operations on each of them."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from pretrain.checkpoint.__main__ import main
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.storage import Storage
from tests.distributed import run_ranks
from tests.faults.killed_runs import Moment, small_run, train, undisturbed
from tests.pretrain.checkpoint_fixtures import assert_holds, contents, open_store
from tests.pretrain.test_checkpoint_faults import ranks_of_world
from tests.pretrain.tiny_run import write_data

RANKS = (0, 1)


def save(run_dir: Path, step: int, victim: int | None, point: int) -> int:
    """Both ranks save; `victim` dies before its storage operation `point`. How many there were."""
    ranks = ranks_of_world()
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
    return count


def assert_nothing_torn(run_dir: str | Path) -> None:
    """Whatever bears the name of a checkpoint is one."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["verify", str(run_dir)]) == 0


def every_point(points: list[int]) -> Iterator[tuple[int, int]]:
    yield from ((rank, point) for rank in RANKS for point in range(points[rank]))


def test_a_crash_at_any_operation_of_either_rank_leaves_a_complete_checkpoint(
    tmp_path: Path,
) -> None:
    run_ranks(save, 2, tmp_path / "begun", 1, None, 0)
    shutil.copytree(tmp_path / "begun", tmp_path / "whole")
    points = run_ranks(save, 2, tmp_path / "whole", 2, None, 0)
    found_steps: dict[int, list[int]] = {0: [], 1: []}
    for rank, point in every_point(points):
        run_dir = tmp_path / f"rank_{rank}_{point}"
        shutil.copytree(tmp_path / "begun", run_dir)
        with pytest.raises(AssertionError, match=f"rank {rank}: exit -9"):
            run_ranks(save, 2, run_dir, 2, rank, point)
        assert_nothing_torn(run_dir)
        store = open_store(run_dir)
        found = store.find("must")
        store.close()
        assert found is not None
        assert_holds(found, found.step, num_ranks=2)
        found_steps[rank].append(found.step)
    print(
        f"\ncrashes in a save of 2 ranks: {points[0]} operations of rank 0 + {points[1]} of rank "
        f"1, a complete checkpoint after {sum(map(len, found_steps.values()))} of {sum(points)}"
    )
    # The old one up to the rename, which is rank 0's, and the new one from there on.
    assert found_steps[0] == sorted(found_steps[0])
    assert Counter(found_steps[0]).keys() == {1, 2}
    assert set(found_steps[1]) == {1}
    assert sum(points) >= 50


@pytest.mark.slow
def test_a_run_that_crashes_at_any_operation_of_a_save_goes_on_to_the_same_bits(
    tmp_path: Path,
) -> None:
    write_data(tmp_path)
    # The save of step 3 is the first that deletes an older one.
    run = undisturbed(tmp_path, steps=4, interval=1)
    moments = [Moment(3, "save", rank, point) for rank, point in every_point(run.points)]
    begun = small_run(tmp_path / "begun", steps=4, interval=1)
    with pytest.raises(AssertionError, match="rank 0: exit -9"):
        train(begun, tmp_path / "trace_begun", Moment(3, "load", 0))
    same = 0
    for moment in moments:
        name = f"rank_{moment.victim}_{moment.point}"
        config = small_run(tmp_path / name, steps=4, interval=1)
        shutil.copytree(begun.run_dir, config.run_dir)
        with pytest.raises(AssertionError, match=f"rank {moment.victim}: exit -9"):
            train(config, tmp_path / f"{name}_killed", moment)
        assert_nothing_torn(config.run_dir)
        train(config, tmp_path / f"{name}_resumed")
        same += files_of(config) == files_of(run.config)
        shutil.rmtree(config.run_dir)
    print(
        f"\ncrashes in a save of a real run: {run.points[0]} operations of rank 0 + "
        f"{run.points[1]} of rank 1, {same} of {len(moments)} went on to the same bits"
    )
    assert same == len(moments) >= 60


def files_of(config):
    return read_manifest(Path(config.run_dir, "checkpoints", "step_4")).files
