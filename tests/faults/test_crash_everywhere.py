"""A save of two ranks, ended at each of its storage operations on each of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from parallel.checkpoint.manifest import read_manifest
from tests.faults.killed_runs import Moment, small_run, train, undisturbed
from tests.faults.killed_saves import assert_nothing_torn, crash_everywhere, every_point
from tests.pretrain.tiny_run import write_data


def test_a_crash_at_any_operation_of_either_rank_leaves_a_complete_checkpoint(
    tmp_path: Path,
) -> None:
    points, found = crash_everywhere(tmp_path)
    print(
        f"\ncrashes in a save of 2 ranks: {points[0]} operations of rank 0 + {points[1]} of rank "
        f"1, a complete checkpoint after {sum(map(len, found))} of {sum(points)}"
    )
    # The old one up to the rename, which is rank 0's, and the new one from there on.
    assert found[0] == sorted(found[0])
    assert set(found[0]) == {1, 2}
    assert set(found[1]) == {1}
    assert sum(map(len, found)) == sum(points) >= 50


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
