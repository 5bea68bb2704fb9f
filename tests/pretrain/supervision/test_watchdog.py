"""A hung rank ends the run: in time, by name, with the stacks of all live ranks."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from data_tools.sampling.token_dataset import TokenDataset
from models import registry
from pretrain import run
from pretrain.checkpointing import CheckpointStore
from pretrain.config import RunConfig
from pretrain.distributed.process_groups import group_timeout, process_groups
from pretrain.engine import engine
from pretrain.engine.engine import PlainEngine, StageEngine
from pretrain.errors import EXIT_HUNG
from pretrain.supervision.watchdog import Ending, Watchdog
from tests.distributed import run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import SEQ, metrics, tiny_run, write_data

TIMEOUT = 5.0  # in which an activity ends also on a machine that is busy with other things


@pytest.fixture(scope="module", autouse=True)
def mixture():
    """The mixture family among the registered ones."""
    entry = registry._Entry("tests.models.mixture", "MixtureConfig")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._FAMILIES, "mixture", entry)
        yield


class Case(NamedTuple):
    """A rank hangs where it calls a function for the `count`-th time."""

    rank: int
    how: str
    owner: object
    function: str
    activity: str  # what the others say that they are in
    count: int = 1
    changes: Mapping[str, Any] = MappingProxyType({})
    zero: int = 1


STEP = (PlainEngine, "train_step", "step 3", 3)
STAGE = (StageEngine, "train_step", "step 3", 3)
TENSOR, PIPELINE = {"parallel__tensor": 2}, {"parallel__pipeline": 2}
EXPERT = {
    "model": {"family": "mixture", "max_position_embeddings": SEQ},
    "parallel__expert": 2,
}
CASES = {
    "data": Case(1, "stopped", *STEP),
    "tensor, rank 0": Case(0, "stopped", *STEP, TENSOR),
    "save": Case(1, "stopped", CheckpointStore, "save", "saving step 2"),
}
MORE_CASES = {
    "pipeline": Case(1, "asleep", *STAGE, PIPELINE),
    "data index of rank 0": Case(0, "asleep", run, "open_training_data", "opening the data"),
    "data, rank 0": Case(0, "asleep", *STEP),
    "data, the GIL": Case(1, "holds the GIL", *STEP),
    "loader": Case(1, "asleep", TokenDataset, "read", "step", 7),
    "data, ZeRO-3": Case(1, "stopped", *STEP, zero=3),
    "tensor": Case(1, "asleep", *STEP, TENSOR),
    "pipeline, rank 0": Case(0, "stopped", *STAGE, PIPELINE),
    "expert": Case(1, "stopped", *STEP, EXPERT),
    "evaluation": Case(1, "asleep", PlainEngine, "evaluate", "evaluating after step 2"),
    "evaluation of a pipeline": Case(
        1, "stopped", StageEngine, "evaluate", "evaluating after step 2", 1, PIPELINE
    ),
    "groups": Case(1, "stopped", run, "build_context", "creating process groups"),
    "engine": Case(1, "stopped", run, "build_engine", "writing config.yaml", 1, TENSOR),
    "search": Case(1, "asleep", CheckpointStore, "find", "searching for a checkpoint"),
    "restoration": Case(1, "stopped", engine, "restore_optimizer_state", "restoring step 2"),
}


def _train(config: RunConfig, case: Case) -> None:
    """Train; one rank, when it comes to its place, notes when and hangs."""
    if int(os.environ["RANK"]) == case.rank:
        original, calls = getattr(case.owner, case.function), []

        def stand_still(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if len(calls) == case.count:
                Path(config.run_dir).mkdir(parents=True, exist_ok=True)
                Path(config.run_dir, "still").write_text(str(time.time()))
                if case.how == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif case.how == "holds the GIL":
                    ctypes.PyDLL(None).pause()
                time.sleep(1e6)
            return original(*args, **kwargs)

        setattr(case.owner, case.function, stand_still)
    run_training(config, f"configs/ds/zero{case.zero}.json")


def _named(case: Case) -> str:
    if case.how == "stopped" and case.rank == 0:
        return "rank 0, which keeps the record of all ranks, does not answer"
    process = rf"rank {case.rank} \(process \d+ on \S+, "
    if case.how != "asleep":
        return rf"{process}.*last heard of in .*\) does not answer"
    return rf"{process}.*\) is in \S+ \(\w+(/\w+)+\.py:\d+\) and has not entered \w+ (of|to) "


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_CASES)]
)
def test_a_rank_that_stands_still_is_named_in_time(name, tmp_path):
    case = {**CASES, **MORE_CASES}[name]
    write_data(tmp_path)
    lasting = {"training__max_steps": 1000, "watchdog__timeout": TIMEOUT}
    config = tiny_run(tmp_path, **lasting, **case.changes)
    if "restoration" in name:
        run_ranks(run_training, 2, tiny_run(tmp_path, training__max_steps=2), init=False)
    with pytest.raises(AssertionError) as ended:
        run_ranks(_train, 2, config, case, init=False, patience=3.0)
    report = str(ended.value)
    assert f"exit {EXIT_HUNG}" in report
    [said] = re.findall(r"error on rank \d: (.*)", report)
    assert said.startswith(f"no progress in {case.activity}"), said
    assert re.search(_named(case), said), said
    stacks = [Path(config.run_dir, f"stacks_rank_{rank:05d}.txt") for rank in range(2)]
    found = stacks[1 - case.rank].stat().st_mtime
    found -= float(Path(config.run_dir, "still").read_text())
    print(f"{name}: found after {found - TIMEOUT:.1f} s more than the timeout")
    assert found < TIMEOUT + 5
    assert "most recent call first" in stacks[1 - case.rank].read_text()
    if case.how != "holds the GIL":  # one that was stopped is woken to say where it was
        assert "in stand_still" in stacks[case.rank].read_text()
        assert report.count(f"exit {EXIT_HUNG}") == 2, report


def _watch(folder: Path, moves: int, *, limit: float = 1.0) -> Ending | None:
    """The watchdog's verdict on a rank 2 that begins two activities less than the others."""
    rank, endings = int(os.environ["RANK"]), []
    watchdog = Watchdog(
        *(folder,),
        rank=rank,
        size=dist.get_world_size(),
        store=distributed_c10d._get_default_store(),
        timeout=limit,
        end=endings.append,
    )
    with watchdog:
        for step in range(moves if rank == 2 else moves + 2):
            watchdog.progress(f"step {step}")
            time.sleep(0.2)
        time.sleep(5 if limit == 1.0 else 0)
    return endings[0] if endings else None


def test_all_ranks_end_and_one_of_them_names_the_one_that_is_behind(tmp_path):
    endings = run_ranks(_watch, 3, tmp_path, 4)
    assert {ending.code for ending in endings} == {EXIT_HUNG}
    [said] = [ending.message for ending in endings if ending.message is not None]
    assert re.search(
        r"no progress in step \d for 1 s .*: rank 2 .*in step 3\).*is the furthest behind", said
    )
    kinds = ("flight_recorder_rank_0000{}.json", "stacks_rank_0000{}.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        kind.format(rank) for kind in kinds for rank in range(3)
    ]


def test_ranks_that_move_are_left_alone(tmp_path):
    assert run_ranks(_watch, 2, tmp_path, 8, limit=2.0) == [None, None]


def test_one_process_alone_is_watched_too(tmp_path):
    endings: list[Ending] = []
    with Watchdog(tmp_path, timeout=0.5, end=endings.append):
        time.sleep(1.5)
    assert "there is no other rank" in (endings[0].message or "")


def _timeouts(config: RunConfig) -> dict[str, float]:
    """The timeout of every group that there is at the end of a run."""
    found: dict[str, float] = {}

    def note(self: Any, *_: Any) -> None:
        for group in process_groups():
            backend = group._get_backend(next(iter(group._device_types)))
            found[f"{group.group_name} {group.group_desc}"] = backend.options._timeout

    Watchdog.on_exit = note  # called last while there are groups
    run_training(config)
    return found


@pytest.mark.parametrize(
    "layout", [{}, TENSOR, PIPELINE, EXPERT], ids=["data", "tensor", "pipeline", "expert"]
)
def test_every_group_of_a_run_has_the_timeout_of_the_run(layout, tmp_path):
    write_data(tmp_path)
    config = tiny_run(tmp_path, training__max_steps=2, watchdog__timeout=77.0, **layout)
    for timeouts in run_ranks(_timeouts, 2, config, init=False):
        assert len(timeouts) > 3
        assert set(timeouts.values()) == {group_timeout(77.0)}, timeouts


def _train_by_a_wrong_clock(config: RunConfig) -> int:
    """Every look at the clock finds it an hour earlier."""
    hours = itertools.count()
    time.time = lambda: 2e9 - 3600.0 * next(hours)
    return run_training(config)


def test_a_clock_that_is_set_back_changes_nothing(tmp_path):
    write_data(tmp_path)
    changes = {"watchdog__timeout": 20.0, "checkpoint__keep": 5}
    config = tiny_run(tmp_path, **changes)
    assert run_ranks(_train_by_a_wrong_clock, 2, config, init=False) == [0, 0]
    checkpoints = Path(config.run_dir, "checkpoints")
    os.utime(checkpoints / "step_2", (3e9, 3e9))
    os.utime(checkpoints / "step_4", (1e9, 1e9))
    more = tiny_run(tmp_path, training__max_steps=6, **changes)
    assert run_ranks(_train_by_a_wrong_clock, 2, more, init=False) == [0, 0]
    assert [int(record["step"]) for record in metrics(more)[0]] == [1, 2, 3, 4, 5, 6]
