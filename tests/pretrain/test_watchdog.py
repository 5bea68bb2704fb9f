"""A rank that stands still ends the run: in time, by name, with the stacks of those that live."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from models import registry
from pretrain import loop
from pretrain.checkpoint import CheckpointStore
from pretrain.config import RunConfig
from pretrain.distributed import group_timeout, process_groups
from pretrain.engine import PipelineEngine, PlainEngine
from pretrain.errors import EXIT_HUNG
from pretrain.loop import TrainLoop
from pretrain.loop import run as run_training
from pretrain.watchdog import Ending, Watchdog
from tests.distributed import run_ranks
from tests.pretrain.tiny_run import SEQ, tiny_run, write_data

TIMEOUT = 1.5


@pytest.fixture(scope="module", autouse=True)
def mixture():
    """The mixture family among the registered ones."""
    entry = registry._Entry("tests.models.mixture", "MixtureConfig")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._FAMILIES, "mixture", entry)
        yield


class Case(NamedTuple):
    """A rank stands still where it calls a function for the `count`-th time."""

    rank: int
    how: str
    owner: object
    function: str
    activity: str  # what the others say that they are in
    count: int = 1
    changes: dict[str, Any] = {}
    zero: int = 1


STEP = (PlainEngine, "train_step", "step 3", 3)
STAGE = (PipelineEngine, "train_step", "step 3", 3)
TENSOR, PIPELINE = {"parallel__tensor": 2}, {"parallel__pipeline": 2}
EXPERT = {
    "model": {"family": "mixture", "max_position_embeddings": SEQ},
    "parallel__expert": 2,
}
CASES = {
    "data": Case(1, "stopped", *STEP),
    "tensor, rank 0": Case(0, "stopped", *STEP, TENSOR),
    "pipeline": Case(1, "asleep", *STAGE, PIPELINE),
    "save": Case(1, "stopped", CheckpointStore, "save", "the save of step 2"),
    "data index of rank 0": Case(0, "asleep", loop, "_train_loader", "the opening of the data"),
}
MORE_CASES = {
    "data, rank 0": Case(0, "asleep", *STEP),
    "data, ZeRO-3": Case(1, "stopped", *STEP, zero=3),
    "tensor": Case(1, "asleep", *STEP, TENSOR),
    "pipeline, rank 0": Case(0, "stopped", *STAGE, PIPELINE),
    "expert": Case(1, "stopped", *STEP, EXPERT),
    "evaluation": Case(1, "asleep", PlainEngine, "evaluate", "the evaluation after step 2"),
    "evaluation of a pipeline": Case(
        1, "stopped", PipelineEngine, "evaluate", "the evaluation after step 2", 1, PIPELINE
    ),
    "groups": Case(1, "stopped", loop, "build_context", "the making of process groups"),
    "engine": Case(1, "stopped", loop, "build_engine", "the building of the model", 1, TENSOR),
    "search": Case(1, "asleep", CheckpointStore, "find", "the search for a checkpoint"),
    "restoration": Case(1, "stopped", loop, "load_engine_state", "the restoration of step 2"),
    "restoration of a layout": Case(
        1, "asleep", loop, "restore_optimizer_state", "the restoration of step 2"
    ),
}


def _train(config: RunConfig, case: Case) -> None:
    """Train; one rank, when it comes to its place, notes when and stands still."""
    if int(os.environ["RANK"]) == case.rank:
        original, calls = getattr(case.owner, case.function), []

        def stand_still(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if len(calls) == case.count:
                Path(config.run_dir).mkdir(parents=True, exist_ok=True)
                Path(config.run_dir, "still").write_text(str(time.time()))
                if case.how == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(1e6)
            return original(*args, **kwargs)

        setattr(case.owner, case.function, stand_still)
    run_training(config, f"configs/ds/zero{case.zero}.json")


def _named(case: Case) -> str:
    if case.how == "stopped" and case.rank == 0:
        return "rank 0, which keeps the record of all ranks, does not answer"
    process = rf"rank {case.rank} \(process \d+ on \S+, "
    if case.how == "stopped":
        return rf"{process}.*\) does not answer"
    return rf"{process}.*\) is in \w+ \(pretrain/\w+.py:\d+\) and has not entered \w+ of "


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_CASES)]
)
def test_a_rank_that_stands_still_is_named_in_time(name, tmp_path):
    case = {**CASES, **MORE_CASES}[name]
    write_data(tmp_path)
    lasting = {"training__max_steps": 1000, "watchdog__timeout": TIMEOUT}
    config = tiny_run(tmp_path, **lasting | case.changes)
    if "restoration" in name:
        before = {"parallel__pipeline": 2} if "layout" in name else {}
        run_ranks(run_training, 2, tiny_run(tmp_path, training__max_steps=2, **before), init=False)
    with pytest.raises(AssertionError) as ended:
        run_ranks(_train, 2, config, case, init=False, patience=0.5)
    report = str(ended.value)
    assert f"exit {EXIT_HUNG}" in report
    [said] = re.findall(r"error on rank \d: (.*)", report)
    assert said.startswith(f"no progress in {case.activity} for "), said
    assert re.search(_named(case), said), said
    stacks = Path(config.run_dir, f"stacks_rank_{1 - case.rank:05d}.txt")
    found = stacks.stat().st_mtime - float(Path(config.run_dir, "still").read_text())
    print(f"{name}: found after {found - TIMEOUT:.1f} s more than the timeout")
    assert found < TIMEOUT + 5
    assert "most recent call first" in stacks.read_text()
