"""Asynchronous saves: the files of synchronous ones, and ends of a run during a save."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
import pretrain.run
from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.manifest import MANIFEST_NAME, read_manifest
from parallel.checkpoint.storage import Hook, Storage
from parallel.checkpoint.weights import Weight
from parallel.sharding import Sharding
from pretrain.checkpointing import CheckpointStore, async_save
from pretrain.checkpointing.async_save import Checkpointer, HostBuffers, snapshot
from pretrain.checkpointing.optimizer_shards import OptimizerShard
from pretrain.distributed.consensus import RankGroup
from pretrain.errors import EXIT_COMPLETED, EXIT_HUNG, EXIT_STOPPED, TrainingError
from pretrain.loop import TrainLoop
from tests.distributed import run_ranks
from tests.pretrain.checkpointing.fixtures import assert_holds, contents, open_store
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import curve, tiny_run
from tests.tiers import tiered

LONG = 30.0  # seconds; a test that waits for so long has failed


def asynchronous_run(data: Path, run_dir: Path, **changes: Any):
    return tiny_run(data, run_dir=str(run_dir), checkpoint__asynchronous=True, **changes)


def before_background_operations(hook: Hook) -> None:
    """In this process: call `hook` in the thread that saves, before each operation on the disk."""
    point = Storage.point

    def hooked(self, operation, path):
        if threading.current_thread() is not threading.main_thread():
            hook(operation, path)
        point(self, operation, path)

    Storage.point = hooked  # type: ignore[method-assign]


def after_steps(action: Callable[[TrainLoop], None]) -> None:
    """In this process: call `action` whenever a step of a run is done, before it is saved."""
    log = TrainLoop._log

    def logged(self, *args):
        log(self, *args)
        action(self)

    TrainLoop._log = logged  # type: ignore[method-assign]


LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "ZeRO-0": (1, 0, {}),
    "ZeRO-1 bf16": (1, 1, {"training__precision": "bf16"}),
    "data 2, ZeRO-1": (2, 1, {"training__batch_size": 2}),
    "data 2, ZeRO-3": (2, 3, {"training__batch_size": 2}),
    "tensor 2": (2, 1, {"parallel__tensor": 2}),
    "pipeline 2, tied": (2, 1, {"parallel__pipeline": 2, "model__tie_embeddings": True}),
}


def saved_both_ways(config, ds_config_path: str) -> tuple[int, int]:
    """`run` that writes step 2 while it trains step 3, and saves in the step as well, elsewhere.

    Returns how many bytes the copies of this rank have, of what is written and in all.
    """
    trained = threading.Event()
    buffers: list[HostBuffers] = []
    in_step = TrainLoop._contents

    def save_in_step(self):
        found = in_step(self)
        directory = Path(config.run_dir, "in_step")
        store = CheckpointStore(
            directory, identity=self.checkpointer.identity, keep=9, ranks=self.ranks
        )
        store.save(found)
        store.close()
        buffers.append(self.checkpointer._buffers)
        return found

    def wait_for_the_next_step(operation, path):
        if operation == "open" and "step_2" in str(path):
            assert trained.wait(LONG)

    TrainLoop._contents = save_in_step  # type: ignore[method-assign]
    after_steps(lambda loop: trained.set() if loop.state.step == 3 else None)
    before_background_operations(wait_for_the_next_step)
    assert run_training(config, ds_config_path) == EXIT_COMPLETED
    assert buffers[0] is buffers[1]
    sizes = {name: buffer.nbytes for name, buffer in buffers[0]._buffers.items()}
    written = {name: size for name, size in sizes.items() if not name.startswith("compared/")}
    return sum(written.values()), sum(sizes.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_are_those_of_a_save_in_the_step_though_steps_change_the_state(
    layout, data, tmp_path
):
    world_size, stage, changes = LAYOUTS[layout]
    config = asynchronous_run(data, tmp_path, **changes)
    held = run_ranks(
        saved_both_ways, world_size, config, f"configs/ds/zero{stage}.json", init=False
    )
    expected, found = (
        {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        for root in (tmp_path / "in_step" / "checkpoints", tmp_path / "checkpoints")
    )
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    weights = "weights/pp_00_tp_00.safetensors"
    assert found[Path("step_2", weights)] != found[Path("step_4", weights)]
    manifest = read_manifest(tmp_path / "checkpoints" / "step_2")
    for rank, (written, size) in enumerate(held):
        # Nothing is copied that the rank does not write, but for weights to compare masters with.
        assert 0 < written < sum(e.size for e in manifest.files.values() if e.rank == rank)
        assert size <= written * 4 / 3


def killed_while_saving(config, ds_config_path: str) -> None:
    """`run`, ended by SIGKILL after step 5, when step 4 is copied and none of its files is done."""
    before_background_operations(
        lambda operation, path: time.sleep(LONG if "step_4" in str(path) else 0)
    )
    after_steps(lambda loop: os.kill(os.getpid(), signal.SIGKILL) if loop.state.step == 5 else None)
    run_training(config, ds_config_path)


@pytest.mark.parametrize("layout", tiered(["ZeRO-1 bf16", "data 2, ZeRO-3"], ["ZeRO-1 bf16"]))
def test_a_run_killed_during_a_background_save_continues_like_an_undisturbed_one(
    layout, data, tmp_path
):
    world_size, stage, changes = LAYOUTS[layout]
    json_file = f"configs/ds/zero{stage}.json"
    undisturbed = tiny_run(data, run_dir=str(tmp_path / "a"), training__max_steps=6, **changes)
    run_ranks(run_training, world_size, undisturbed, json_file, init=False)
    killed = asynchronous_run(data, tmp_path / "b", training__max_steps=6, **changes)
    with pytest.raises(AssertionError, match="exit -9"):
        run_ranks(killed_while_saving, world_size, killed, json_file, init=False)
    assert (tmp_path / "b" / "checkpoints" / "latest").read_text() == "step_2\n"
    codes = run_ranks(run_training, world_size, killed, json_file, init=False)
    assert codes == [EXIT_COMPLETED] * world_size
    assert curve(killed) == curve(undisturbed)
    last, expected = (
        {p.relative_to(run_dir): p.read_bytes() for p in sorted(run_dir.rglob("step_6/*/*"))}
        for run_dir in (tmp_path / "b", tmp_path / "a")
    )
    assert len(expected) > 2 * world_size
    for path, content in expected.items():
        assert path.parent.name == "rng" or last[path] == content, path


def fails_on_the_second_rank(run_dir: Path) -> list[str]:
    """Save steps 1 to 4 of which rank 1 cannot write the second; what each call raised."""
    ranks = RankGroup.of_world(timeout=None)

    def hook(operation, path):
        if ranks.rank == 1 and operation == "open" and "step_2" in str(path):
            raise OSError(28, "No space left on device", str(path))

    store = open_store(run_dir, ranks=ranks, storage=Storage(hook=hook))
    saves = Checkpointer(store, asynchronous=True, progress=str)
    raised = []
    for step in (1, 2, 3, 4):
        try:
            saves.save(contents(step, ranks=ranks))
        except CheckpointError as error:
            raised.append(f"save of step {step}: {error}")
    saves.wait()
    return raised


def test_what_one_rank_cannot_write_all_ranks_raise_at_the_next_save(tmp_path):
    messages = run_ranks(fails_on_the_second_rank, 2, tmp_path)
    assert messages[0] == messages[1]
    (message,) = messages[0]
    assert message.startswith("save of step 3: step_2 was not saved, rank 1: OSError: [Errno 28]")
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_1", "step_4"]


def fails_at_the_end(config) -> str:
    """`run` whose last save cannot be written; its error."""

    def hook(operation, path):
        if operation == "open" and "step_4" in str(path):
            raise OSError(28, "No space left on device", str(path))

    before_background_operations(hook)
    with pytest.raises(CheckpointError) as error:
        run_training(config)
    return str(error.value)


def test_a_last_save_that_fails_is_an_error_and_leaves_no_marker(data, tmp_path):
    (message,) = run_ranks(fails_at_the_end, 1, asynchronous_run(data, tmp_path), init=False)
    assert "step_4 was not saved, rank 0: OSError: [Errno 28] No space left on device" in message
    assert [path.name for path in tmp_path.iterdir() if path.name.isupper()] == []
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_2\n"


def stopped_while_saving(config, ds_config_path: str) -> int:
    """`run` with slow saves that is asked to stop in step 2, which it does after the next one."""
    write_marker = pretrain.run.write_marker

    def check_and_leave(run_dir, code):
        assert (run_dir / "checkpoints" / "step_3" / MANIFEST_NAME).is_file()
        write_marker(run_dir, code)

    pretrain.run.write_marker = check_and_leave
    before_background_operations(
        lambda operation, path: time.sleep(0.2 if operation == "open" else 0)
    )
    after_steps(lambda loop: os.kill(os.getpid(), signal.SIGTERM) if loop.state.step == 2 else None)
    return run_training(config, ds_config_path)


def test_a_run_that_is_asked_to_stop_publishes_before_it_leaves_its_marker(data, tmp_path):
    config = asynchronous_run(data, tmp_path, training__max_steps=6)
    (code,) = run_ranks(stopped_while_saving, 1, config, "configs/ds/zero1.json", init=False)
    assert code == EXIT_STOPPED
    assert (tmp_path / "REQUEUE").is_file()
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_3\n"


def test_looking_for_a_checkpoint_waits_for_the_save_under_way(tmp_path):
    def hook(operation, path):
        time.sleep(0.02)

    store = open_store(tmp_path, storage=Storage(hook=hook))
    with Checkpointer(store, asynchronous=True, progress=str) as running:
        running.save(contents(1))
        assert_holds(running.find("must"), 1)


def save_and_fail(running: Checkpointer, error: Exception) -> None:
    with running:
        running.save(contents(1))
        raise error


@pytest.mark.parametrize("error", [TrainingError("not finite"), RuntimeError("elsewhere")])
def test_another_error_lets_the_save_end_and_is_not_hidden_by_it(error, tmp_path, caplog):
    for number, fails in enumerate((False, True)):
        run_dir = tmp_path / str(number)

        def hook(operation, path, fails=fails):
            time.sleep(0.01)
            if fails and operation == "rename":
                raise OSError("disk gone")

        store = open_store(run_dir, storage=Storage(hook=hook))
        with pytest.raises(type(error), match=str(error)):
            save_and_fail(Checkpointer(store, asynchronous=True, progress=str), error)
        store.close()
        assert (run_dir / "checkpoints" / "step_1").is_dir() is not fails
        assert ("a save failed, too: OSError: disk gone" in caplog.text) is fails


def test_an_error_of_this_rank_alone_gives_a_save_up_that_does_not_end(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(async_save, "_DRAIN_SECONDS", 0.2)
    released = threading.Event()

    def hook(operation, path):
        assert released.wait(LONG)

    store = open_store(tmp_path, storage=Storage(hook=hook))
    running = Checkpointer(store, asynchronous=True, progress=str)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="elsewhere"):
        save_and_fail(running, RuntimeError("elsewhere"))
    assert time.monotonic() - begin < LONG / 2
    assert "the save of step 1 is given up" in caplog.text
    store.close()  # the lock is gone, and so the thread publishes nothing
    released.set()
    thread = running._running
    assert thread is not None
    thread.join(LONG)
    assert "the lock of" in str(thread.error)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def hangs_on_the_second_rank(config) -> None:
    """`run` in which rank 1 never comes back from writing step 2."""
    if os.environ["RANK"] == "1":
        before_background_operations(lambda operation, path: time.sleep(1e6))
    run_training(config)


def test_a_save_that_hangs_is_found_by_the_watchdog_and_its_rank_is_named(data, tmp_path):
    config = asynchronous_run(
        data, tmp_path, watchdog__timeout=2.0, training__batch_size=2, training__max_steps=8
    )
    with pytest.raises(AssertionError) as ended:
        run_ranks(hangs_on_the_second_rank, 2, config, init=False)
    report = str(ended.value)
    assert f"exit {EXIT_HUNG}" in report
    assert "no progress in waiting for " in report
    assert re.search(
        r"rank 1 .* in waiting for the save of step 2\) is in wait "
        r"\(pretrain/checkpointing/async_save\.py:\d+\) and has not entered \w+ of all ranks",
        report,
    )
    assert "in _write_optimizer\n" in (tmp_path / "stacks_rank_00001.txt").read_text()


def test_what_cannot_be_copied_is_raised_where_it_would_be_written():
    """So that every rank gets to where all of them agree on a failure."""

    def no_shard() -> OptimizerShard:
        raise CheckpointError("a weight is not its master rounded")

    class NoMemory(HostBuffers):
        def copy(self, name, tensor):
            if name == "weights/b":
                raise RuntimeError("no memory")
            return super().copy(name, tensor)

    loaded = []

    def load(name: str) -> torch.Tensor:
        loaded.append(name)
        return torch.tensor(1.0)

    weights = [Weight(n, (), torch.float32, Sharding(), partial(load, n)) for n in ("a", "b", "c")]
    held = snapshot(contents(1)._replace(optimizer=no_shard, weights=weights), NoMemory())
    assert loaded == ["a", "b", "c"]
    assert held.optimizer is not None
    with pytest.raises(CheckpointError, match="master"):
        held.optimizer()
    assert held.weights[0].load() == held.weights[2].load() == 1.0
    with pytest.raises(RuntimeError, match="no memory"):
        held.weights[1].load()
