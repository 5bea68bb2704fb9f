"""Returning to a checkpoint: what an interruption leaves, what is remembered, what is kept."""

from __future__ import annotations

import random
import shutil
from functools import partial
from pathlib import Path

import pytest

from parallel.checkpoint import newest
from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.newest import find_manifest, newest_checkpoint
from parallel.checkpoint.rollback_record import ROLLBACKS_NAME, SkippedData
from parallel.checkpoint.storage import Storage, fault_hook
from parallel.checkpoint.weights_reader import find_weights
from pretrain.checkpoint import main
from pretrain.checkpointing.async_save import Checkpointer
from pretrain.checkpointing.directory import steps_in
from pretrain.checkpointing.retention import surplus
from pretrain.checkpointing.store import CheckpointStore
from pretrain.distributed.consensus import RankGroup
from tests.distributed import run_ranks
from tests.pretrain.checkpointing.fixtures import assert_holds, contents, flip_bit, open_store
from tests.pretrain.checkpointing.test_store_faults import (
    PowerLoss,
    VolatileStorage,
    count_points,
    killed_at,
)
from tests.refusals import assert_refused

FIRST = SkippedData(steps=(2, 3), samples=(8, 16))
SECOND = SkippedData(steps=(5, 9), samples=(32, 72))
_refused = partial(assert_refused, error=CheckpointError)


def _up_to(step: int):
    return lambda steps: [each for each in steps if each <= step]


def _run(run_dir: Path, *steps: int) -> Path:
    """A run with checkpoints of `steps`."""
    store = open_store(run_dir, keep=9)
    for step in steps:
        store.save(contents(step))
    store.close()
    return run_dir


def _return(run_dir: Path, storage: Storage, *, skipped=(FIRST, SECOND)) -> None:
    """Open the directory and return to step 4, as a run does."""
    store = open_store(run_dir, keep=9, storage=storage)
    try:
        found = store.find("auto", order=_up_to(5))
        assert found is not None
        assert store.return_to(found, skipped).skipped == skipped
    finally:
        store.close()


def _interrupted(run_dir: Path) -> Path:
    """The same run after a rollback that has written its record and `latest`, and no more."""
    fault = {"MANYFORMER_FAULT": "rename#2@rank0:eio", "MANYFORMER_FAULT_TESTS": "1"}
    with pytest.raises(CheckpointError):
        _return(run_dir, Storage(hook=fault_hook(fault, 0)))
    assert steps_in(run_dir / "checkpoints") == [8, 6, 4]
    return run_dir


def _found_after(run_dir: Path) -> tuple[int, tuple[SkippedData, ...]]:
    """What the next start finds, whose next save succeeds; `latest` always names a checkpoint.

    An export, say, that takes the newest checkpoint before that start takes the same one.
    """
    directory = run_dir / "checkpoints"
    exported = newest_checkpoint(run_dir)
    assert (directory / (directory / "latest").read_text().strip()).is_dir()
    assert main(["verify", str(run_dir)]) == 0
    store = open_store(run_dir, keep=9)
    found = store.find("must")
    assert found is not None
    assert_holds(found, found.step)
    assert exported == found.path
    assert (directory / "latest").read_text() == f"step_{found.step}\n"
    steps = steps_in(directory)
    assert steps[0] == found.step
    store.save(contents(found.step + 2))
    store.close()
    assert steps_in(directory) == [found.step + 2, *steps]
    assert not [entry for entry in directory.iterdir() if entry.name.startswith(".")]
    return found.step, found.skipped


def _assert_decided_once(outcomes: list[tuple[int, tuple[SkippedData, ...]]], *, before) -> None:
    """Up to a point as before the rollback, from there on as after it."""
    wanted = [before, (4, (FIRST, SECOND))]
    assert [each for i, each in enumerate(outcomes) if each not in outcomes[:i]] == wanted
    assert outcomes == sorted(outcomes, key=wanted.index)


@pytest.fixture(scope="module", params=[(), (FIRST,)], ids=["first", "second"])
def before(request, tmp_path_factory) -> tuple[Path, tuple[int, tuple[SkippedData, ...]]]:
    """A run before its first rollback, or before its second; what a start finds there."""
    run_dir = tmp_path_factory.mktemp("before") / "run"
    if request.param:
        _run(run_dir, 4, 10)
        _return(run_dir, Storage(), skipped=request.param)
    return _run(run_dir, *(step for step in (4, 6, 8) if not request.param or step > 4)), (
        8,
        request.param,
    )


def test_a_kill_at_any_point_of_a_rollback_leaves_the_run_before_or_after_it(before, tmp_path):
    num_points = count_points(partial(_return, shutil.copytree(before[0], tmp_path / "count")))
    assert num_points > 30
    outcomes = []
    for point in range(num_points):
        run_dir = shutil.copytree(before[0], tmp_path / f"run_{point}")
        killed_at(point, partial(_return, run_dir))
        outcomes.append(_found_after(run_dir))
    _assert_decided_once(outcomes, before=before[1])


@pytest.mark.parametrize("undo_renames", [True, False])
def test_a_power_loss_at_any_point_of_a_rollback_leaves_the_run_before_or_after_it(
    undo_renames, before, tmp_path
):
    outcomes = []
    for point in range(1000):
        run_dir = shutil.copytree(before[0], tmp_path / f"run_{point}")
        storage = VolatileStorage(point)
        try:
            _return(run_dir, storage)
            break
        except PowerLoss:
            storage.lose_power(run_dir, undo_renames=undo_renames)
        outcomes.append(_found_after(run_dir))
    assert point > 30
    _assert_decided_once(outcomes, before=before[1])


def test_a_kill_while_a_rollback_is_completed_leaves_it_to_the_next_start(tmp_path):
    def start(run_dir: Path, storage: Storage) -> None:
        open_store(run_dir, storage=storage).close()

    interrupted = _interrupted(_run(tmp_path / "run", 4, 6, 8))
    num_points = count_points(partial(start, shutil.copytree(interrupted, tmp_path / "count")))
    assert num_points > 20
    for point in range(num_points):
        run_dir = shutil.copytree(interrupted, tmp_path / f"run_{point}")
        killed_at(point, partial(start, run_dir))
        assert _found_after(run_dir) == (4, (FIRST, SECOND))


def test_a_write_error_at_any_point_of_a_rollback_ends_it_and_the_next_start_decides(
    before, tmp_path
):
    num_points = count_points(partial(_return, shutil.copytree(before[0], tmp_path / "count")))
    outcomes, messages = [], []
    for point in range(num_points):
        run_dir = shutil.copytree(before[0], tmp_path / f"run_{point}")
        fault = {"MANYFORMER_FAULT": f"any#{point}@rank0:enospc", "MANYFORMER_FAULT_TESTS": "1"}
        try:
            _return(run_dir, Storage(hook=fault_hook(fault, 0)))
        except CheckpointError as error:
            messages.append(str(error))
        outcomes.append(_found_after(run_dir))
    assert len(messages) > 20
    assert all("No space left on device" in each and "\n" not in each for each in messages)
    _assert_decided_once(outcomes, before=before[1])


def test_steps_after_the_one_returned_to_are_written_anew(tmp_path):
    store = open_store(tmp_path, keep=9)
    for step in (2, 4, 6, 8):
        store.save(contents(step))
    found = store.find("auto", order=_up_to(5))
    assert_holds(found, 4)
    store.return_to(found, [FIRST])
    assert steps_in(tmp_path / "checkpoints") == [4, 2]

    store.save(contents(6)._replace(trainer={"step": 6, "tokens": 61}))
    again = store.find("auto")
    assert again is not None
    assert (again.step, again.trainer["tokens"], again.skipped) == (6, 61, (FIRST,))
    store.close()


def test_a_save_in_flight_is_published_before_it_is_deleted(tmp_path):
    _run(tmp_path, 4)
    store = open_store(tmp_path, keep=9)
    with Checkpointer(store, asynchronous=True, progress=str) as saves:
        saves.save(contents(8))
        found = saves.find("auto", order=_up_to(5))
        assert_holds(found, 4)
        saves.save(contents(9))
        assert found is not None
        saves.return_to(found, [FIRST])
        assert steps_in(tmp_path / "checkpoints") == [4]
        saves.save(contents(8))
    assert steps_in(tmp_path / "checkpoints") == [8, 4]
    store.close()


def _return_on_ranks(run_dir: Path, environment: dict[str, str]) -> tuple[int, list[int]] | str:
    ranks = RankGroup.of_world(timeout=None)
    storage = Storage(hook=fault_hook(environment, ranks.rank))
    store: CheckpointStore = open_store(run_dir, keep=9, ranks=ranks, storage=storage)
    for step in (4, 6):
        store.save(contents(step, ranks=ranks, storage=storage))
    found = store.find("auto", order=_up_to(5))
    assert found is not None
    try:
        returned = store.return_to(found, [FIRST])
    except CheckpointError as error:
        return str(error)
    assert returned.skipped == (FIRST,)
    store.save(contents(6, ranks=ranks, storage=storage))  # collective: both write, or neither
    return returned.step, steps_in(run_dir / "checkpoints")


def test_all_ranks_return_to_the_same_checkpoint_or_fail_alike(tmp_path):
    assert run_ranks(_return_on_ranks, 2, tmp_path / "a", {}) == [(4, [6, 4])] * 2
    fault = {"MANYFORMER_FAULT": "rename#4@rank0:eio", "MANYFORMER_FAULT_TESTS": "1"}
    ends = run_ranks(_return_on_ranks, 2, tmp_path / "b", fault)
    assert ends[0] == ends[1]
    assert "Input/output error" in ends[0]
    assert ROLLBACKS_NAME in ends[0]
    assert steps_in(tmp_path / "b" / "checkpoints") == [6, 4]


def test_a_run_that_starts_from_the_beginning_skips_nothing(tmp_path, caplog):
    _run(tmp_path, 4, 6)
    _return(tmp_path, Storage())
    directory = tmp_path / "checkpoints"
    (directory / "step_4").rename(tmp_path / "elsewhere")
    (directory / "latest").unlink()
    store = open_store(tmp_path)
    assert store.find("auto") is None
    assert caplog.text.count(f"removing {directory / ROLLBACKS_NAME}") == 1
    store.save(contents(4))
    found = store.find("auto")
    assert found is not None
    assert found.skipped == ()
    store.close()


def test_pruning_completes_a_rollback_first(tmp_path, capsys):
    _interrupted(_run(tmp_path, 4, 6, 8))
    assert main(["prune", str(tmp_path), "--keep", "1"]) == 0
    assert capsys.readouterr().out == "nothing to delete\n"
    assert _found_after(tmp_path) == (4, (FIRST, SECOND))


def test_a_damaged_record_of_rollbacks_is_refused(tmp_path):
    _run(tmp_path, 4, 6)
    _return(tmp_path, Storage())
    path = tmp_path / "checkpoints" / ROLLBACKS_NAME
    content = path.read_bytes()
    for position in range(len(content)):
        flip_bit(path, position)
        for look in (open_store, newest_checkpoint):
            with _refused(ROLLBACKS_NAME, value="damaged", constraint=(), remedy="restore"):
                look(tmp_path)
        path.write_bytes(content)
    open_store(tmp_path).close()


def test_an_interrupted_rollback_to_a_checkpoint_that_is_gone_deletes_nothing(tmp_path):
    _interrupted(_run(tmp_path, 4, 6, 8))
    (tmp_path / "checkpoints" / "step_4").rename(tmp_path / "elsewhere")
    for look in (open_store, newest_checkpoint):
        with _refused(
            ROLLBACKS_NAME, value="step_4", constraint="missing", remedy=("restore", "delete")
        ):
            look(tmp_path)
    assert steps_in(tmp_path / "checkpoints") == [8, 6]
    (tmp_path / "elsewhere").rename(tmp_path / "checkpoints" / "step_4")
    assert _found_after(tmp_path) == (4, (FIRST, SECOND))


def test_whoever_takes_the_newest_checkpoint_passes_over_those_that_a_rollback_discarded(tmp_path):
    """By the same record as the run; only a checkpoint that is named itself is taken whatever it
    is."""
    step_4 = _interrupted(_run(tmp_path, 4, 6, 8)) / "checkpoints" / "step_4"
    assert find_weights(tmp_path) == step_4 / "weights"
    assert find_manifest(tmp_path) == step_4 / "manifest.json"
    assert find_weights(step_4.with_name("step_8")) == step_4.with_name("step_8") / "weights"


def test_a_rollback_recorded_while_checkpoints_are_listed_counts(tmp_path, monkeypatch):
    _run(tmp_path, 4, 6, 8)
    usual = newest._complete_steps

    def listed_before_it(folder: Path) -> dict[int, Path]:
        steps = usual(folder)
        if not (folder / ROLLBACKS_NAME).exists():
            _return(tmp_path, Storage())  # to its end: neither step 6 nor step 8 is there now
        return steps

    monkeypatch.setattr(newest, "_complete_steps", listed_before_it)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_4"


def test_a_job_that_lost_its_lock_deletes_nothing(tmp_path):
    _run(tmp_path, 4, 6)
    store = open_store(tmp_path)
    found = store.find("auto", order=_up_to(5))
    assert found is not None
    (tmp_path / "run.lock").unlink()
    with _refused("lock", value=repr(str(tmp_path)), constraint="step_4", remedy="one job"):
        store.return_to(found, [FIRST])
    assert steps_in(tmp_path / "checkpoints") == [6, 4]
    assert not (tmp_path / "checkpoints" / ROLLBACKS_NAME).exists()


def test_what_a_rollback_may_need_is_kept():
    """Whatever is saved when, a spike in the step after a save finds a checkpoint old enough, if
    one was ever saved, and not one that is much older."""
    draw = random.Random(0)
    for _ in range(300):
        skip_before, keep = draw.choice([0, 1, 5, 20]), draw.choice([1, 2, 5])
        longest = draw.choice([1, 3, 30])
        steps, saved = [], []
        for _ in range(60):
            saved.append((saved[-1] if saved else 0) + draw.randint(1, longest))
            steps.insert(0, saved[-1])
            doomed = surplus(steps, keep=keep, keep_every=None, skip_before=skip_before)
            steps = [step for step in steps if step not in doomed]
            last = saved[-1] - skip_before
            assert len(steps) <= keep + 2
            assert steps[0] == saved[-1]
            if saved[0] <= last:
                fitting = max(step for step in steps if step <= last)
                assert fitting > last - skip_before - 2 * longest
