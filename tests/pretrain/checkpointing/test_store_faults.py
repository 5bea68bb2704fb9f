"""Every storage operation of a save is a place to crash: count them, then crash at each one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.storage import Storage, fault_hook
from pretrain.checkpoint import main
from pretrain.checkpointing.async_save import Checkpointer
from pretrain.distributed.consensus import RankGroup
from tests.distributed import run_ranks
from tests.pretrain.checkpointing.fixtures import assert_holds, contents, open_store


def save_steps(
    run_dir: Path, steps: list[int], storage: Storage, *, asynchronous: bool = False
) -> None:
    """Open the directory and save, as a run does; `keep=1` makes it delete as well."""
    store = open_store(run_dir, keep=1, storage=storage)
    store.find("auto")
    with Checkpointer(store, asynchronous=asynchronous, progress=str) as saves:
        for step in steps:
            saves.save(contents(step, storage=storage))
    store.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has saved step 1; every crash is in a copy of it."""
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    save_steps(run_dir, [1], Storage())
    return run_dir


def count_points(action: Callable[[Storage], None]) -> int:
    points = 0

    def hook(operation: str, path: Path) -> None:
        nonlocal points
        points += 1

    action(Storage(hook=hook))
    return points


def killed_at(point: int, action: Callable[[Storage], None]) -> None:
    """Run `action` in a child process that dies right before its storage operation `point`."""

    def hook(operation: str, path: Path) -> None:
        nonlocal point
        if point == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        point -= 1

    pid = os.fork()
    if pid == 0:
        action(Storage(hook=hook))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_kill_at_any_point_of_a_save_leaves_a_complete_checkpoint(
    saved: Path, tmp_path: Path, asynchronous: bool
) -> None:
    save = partial(save_steps, asynchronous=asynchronous)
    shutil.copytree(saved, tmp_path / "count")
    num_points = count_points(lambda storage: save(tmp_path / "count", [2], storage))
    assert num_points > 30
    outcomes = []
    for point in range(num_points):
        run_dir = shutil.copytree(saved, tmp_path / f"run_{point}")
        killed_at(point, lambda storage, run_dir=run_dir: save(run_dir, [2], storage))

        assert main(["verify", str(run_dir)]) == 0  # nothing torn bears the name of a checkpoint
        store = open_store(run_dir)
        found = store.find("must")
        assert found is not None
        outcomes.append(found.step)
        assert_holds(found, found.step)
        store.save(contents(3))  # and the next save succeeds whatever was left behind
        store.close()
        assert_holds(open_store(run_dir).find("must"), 3)
    assert outcomes == sorted(outcomes)  # the old one up to the rename, the new one from there on
    assert set(outcomes) == {1, 2}


class PowerLoss(BaseException):
    """Not an Exception, so that no handler of the code under test sees it."""


class VolatileStorage(Storage):
    """A disk that forgets what was not flushed: contents, new entries and renames in folders."""

    def __init__(self, fail_at: int) -> None:
        super().__init__(hook=self._note)
        self._countdown = fail_at
        self._contents: set[int] = set()  # inodes of files written and not flushed
        self._entries: dict[int, Path] = {}  # inode of a new file -> its unflushed folder
        self._renames: list[tuple[Path, Path, bytes | None]] = []

    def _note(self, operation: str, path: Path) -> None:
        if self._countdown == 0:
            raise PowerLoss
        self._countdown -= 1
        if operation == "write":
            self._contents.add(path.stat().st_ino)
            self._entries[path.stat().st_ino] = path.parent
        if operation == "fsync":
            self._contents.discard(path.stat().st_ino)
            self._entries = {i: folder for i, folder in self._entries.items() if folder != path}
            self._renames = [r for r in self._renames if r[1].parent != path]

    def rename(self, old: Path, new: Path) -> None:
        replaced = new.read_bytes() if new.is_file() else None
        super().rename(old, new)
        self._renames.append((old, new, replaced))

    def lose_power(self, run_dir: Path, *, undo_renames: bool) -> None:
        for path in [p for p in run_dir.rglob("*") if p.is_file()]:
            inode = path.stat().st_ino
            if inode in self._contents:
                path.write_bytes(b"")
            # What replaces a file is there or not, but the name is.
            if inode in self._entries and path.name not in {"latest", "rollbacks.json"}:
                path.unlink()
        for old, new, replaced in reversed(self._renames if undo_renames else []):
            if new.exists():
                new.rename(old)
            if replaced is not None:
                new.write_bytes(replaced)


@pytest.mark.parametrize("undo_renames", [True, False])
def test_a_power_loss_at_any_point_of_a_save_leaves_a_complete_checkpoint(
    saved: Path, tmp_path: Path, undo_renames: bool
) -> None:
    def save(run_dir: Path, storage: VolatileStorage) -> None:
        def write_engine(directory: Path) -> list[Path]:
            path = directory / "engine" / "rank_0.pt"
            path.parent.mkdir()
            path.touch()
            storage.point("write", path)
            path.write_text("step 2 rank 0")
            return [path]

        store = open_store(run_dir, keep=1, storage=storage)
        try:
            store.find("auto")
            store.save(contents(2, write_engine=write_engine))
        finally:
            store.close()

    found_steps = set()
    for point in range(1000):
        run_dir = shutil.copytree(saved, tmp_path / f"run_{point}")
        storage = VolatileStorage(point)
        try:
            save(run_dir, storage)
            break
        except PowerLoss:
            storage.lose_power(run_dir, undo_renames=undo_renames)
        store = open_store(run_dir)
        found = store.find("must")
        store.close()
        assert found is not None
        assert_holds(found, found.step)
        found_steps.add(found.step)
    assert point > 30
    assert found_steps == {1, 2}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_write_error_at_any_point_keeps_the_old_checkpoint_and_says_why(
    saved: Path, tmp_path: Path, asynchronous: bool
) -> None:
    num_points = count_points(lambda storage: save_steps(tmp_path / "count", [1], storage))
    refused = 0
    for point in range(num_points):
        run_dir = shutil.copytree(saved, tmp_path / f"run_{point}")
        environment = {
            "MANYFORMER_FAULT": f"any#{point}@rank0:enospc",
            "MANYFORMER_FAULT_TESTS": "1",
        }
        storage = Storage(hook=fault_hook(environment, 0))
        message = ""
        try:
            store = open_store(run_dir, keep=2, storage=storage)
            with Checkpointer(store, asynchronous=asynchronous, progress=str) as saves:
                saves.save(contents(2, storage=storage))
        except CheckpointError as error:
            message = str(error)
        if message:
            refused += 1
            assert "No space left on device" in message
            assert str(run_dir) in message
            assert "\n" not in message
        found = open_store(run_dir).find("must")
        assert found is not None
        assert_holds(found, found.step)
    assert refused > 20


def save_on_ranks(run_dir: Path, steps: list[int], environment: dict[str, str]) -> str | None:
    ranks = RankGroup.of_world(timeout=None)
    storage = Storage(hook=fault_hook(environment, ranks.rank))
    store = open_store(run_dir, ranks=ranks, storage=storage)
    store.find("auto")
    try:
        for step in steps:
            store.save(contents(step, ranks=ranks, storage=storage))
    except CheckpointError as error:
        return str(error)
    return None


def find_on_ranks(run_dir: Path, step: int) -> None:
    ranks = RankGroup.of_world(timeout=None)
    assert_holds(open_store(run_dir, ranks=ranks).find("must"), step, num_ranks=ranks.size)


def test_two_ranks_save_and_find_one_checkpoint(tmp_path: Path) -> None:
    assert run_ranks(save_on_ranks, 2, tmp_path, [1, 2, 3], {}) == [None, None]
    run_ranks(find_on_ranks, 2, tmp_path, 3)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("operation", ["engine", "write", "fsync", "hash", "open"])
def test_a_write_error_on_one_rank_stops_every_rank_and_publishes_nothing(
    tmp_path: Path, operation: str, rank: int
) -> None:
    run_ranks(save_on_ranks, 2, tmp_path, [1], {})
    fault = {"MANYFORMER_FAULT": f"{operation}#0@rank{rank}:eio", "MANYFORMER_FAULT_TESTS": "1"}

    messages = run_ranks(save_on_ranks, 2, tmp_path, [2], fault)

    assert messages[0] == messages[1]
    assert (
        f"step_2 was not saved, rank {rank}: OSError: [Errno 5] Input/output error" in messages[0]
    )
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_1"]
    run_ranks(find_on_ranks, 2, tmp_path, 1)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("operation", ["engine", "write", "hash"])
def test_a_rank_killed_during_a_save_leaves_the_old_checkpoint(
    tmp_path: Path, operation: str, rank: int
) -> None:
    run_ranks(save_on_ranks, 2, tmp_path, [1], {})
    fault = {"MANYFORMER_FAULT": f"{operation}#0@rank{rank}:kill", "MANYFORMER_FAULT_TESTS": "1"}

    with pytest.raises(AssertionError, match=f"rank {rank}: exit -9"):
        run_ranks(save_on_ranks, 2, tmp_path, [2], fault)

    run_ranks(find_on_ranks, 2, tmp_path, 1)


def damaged_on_ranks(run_dir: Path) -> None:
    store = open_store(run_dir, ranks=RankGroup.of_world(timeout=None))
    assert_holds(store.find("auto"), 1, num_ranks=2)


def test_damage_in_the_file_of_one_rank_makes_every_rank_fall_back(tmp_path: Path) -> None:
    run_ranks(save_on_ranks, 2, tmp_path, [1, 2], {})
    path = tmp_path / "checkpoints" / "step_2" / "engine" / "rank_1.pt"
    path.write_text(path.read_text().replace("2", "3"))

    run_ranks(damaged_on_ranks, 2, tmp_path)


def test_faults_need_the_switch_besides_the_description() -> None:
    description = {"MANYFORMER_FAULT": "any#0@rank0:eio"}
    assert fault_hook(description, 0) is None
    assert fault_hook({"MANYFORMER_FAULT_TESTS": "1"}, 0) is None
    assert fault_hook({}, 0) is None
    with pytest.raises(ValueError, match=r"MANYFORMER_FAULT='x' .*rename#2"):
        fault_hook({"MANYFORMER_FAULT": "x", "MANYFORMER_FAULT_TESTS": "1"}, 0)


def test_a_fault_hits_the_described_operation_of_the_described_rank() -> None:
    environment = {"MANYFORMER_FAULT": "rename#1@rank1:eio", "MANYFORMER_FAULT_TESTS": "1"}
    other, hook = fault_hook(environment, 0), fault_hook(environment, 1)
    assert other is not None
    assert hook is not None
    for operation in ("rename", "rename", "rename"):
        other(operation, Path("x"))
    hook("write", Path("x"))
    hook("rename", Path("x"))
    with pytest.raises(OSError, match="Input/output error: 'y'"):
        hook("rename", Path("y"))
