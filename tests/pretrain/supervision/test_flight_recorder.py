"""Hangs in collectives that return at once, as those of NCCL do, named by torch's recorder."""

from __future__ import annotations

import json
import os
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from pretrain.errors import EXIT_HUNG
from pretrain.supervision import hang_files
from pretrain.supervision.flight_recorder import Call, find_holdup, keep_records, latest_calls
from pretrain.supervision.watchdog import Watchdog
from tests.distributed import run_ranks


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "100")  # put back afterwards
    keep_records()


def _hang(folder: Path, absent: int) -> None:
    """All ranks but one call a collective and stand where no stack shows it."""
    rank, endings = dist.get_rank(), []
    pair = dist.new_group([0, 1])
    group = dist.group.WORLD if absent == 2 else pair
    numbers = torch.ones(3)
    dist.all_reduce(numbers)
    watchdog = Watchdog(
        folder,
        rank=rank,
        size=dist.get_world_size(),
        store=distributed_c10d._get_default_store(),
        timeout=1.0,
        end=endings.append,
    )
    with watchdog:
        watchdog.progress("step 1")
        works = []  # kept: when a work is deleted it is waited for
        if rank != absent and rank in dist.get_process_group_ranks(group):
            works.append(dist.all_reduce(numbers, group=group, async_op=True))
        deadline = time.monotonic() + 60
        while not endings and time.monotonic() < deadline:
            time.sleep(0.1)
    (folder / f"{rank}.ending").write_text(endings[0].message or "")
    time.sleep(3)  # rank 0 keeps the store, in which the others read the verdict
    os._exit(endings[0].code)


@pytest.mark.parametrize(("absent", "ranks"), [(2, "all ranks"), (1, "ranks 0, 1")])
def test_the_rank_that_has_not_entered_a_collective_is_named(absent, ranks, tmp_path):
    with pytest.raises(AssertionError, match=f"exit {EXIT_HUNG}"):
        run_ranks(_hang, 3, tmp_path, absent, patience=8.0)
    told = [path.read_text() for path in tmp_path.glob("*.ending")]
    [said] = [text for text in told if text]
    assert f": rank {absent} (process" in said
    assert f"has not entered all_reduce of {ranks}" in said
    for rank in range(3):
        records = json.loads((tmp_path / f"flight_recorder_rank_0000{rank}.json").read_text())
        [recorder] = [kept for kept in records.values() if kept.get("entries")]
        assert recorder["entries"][0]["profiling_name"].endswith(":all_reduce")


def call(group: str, number: int, *ranks: int, done: bool = False, begun: bool = False) -> Call:
    return Call(group, f"{group} of it", number, done, begun, ranks)


def test_a_rank_that_waits_itself_holds_nobody_up():
    """0 waits for 1, which waits for 2."""
    calls = {
        0: [call("a", 5, 0, 1)],
        1: [call("a", 4, 0, 1, done=True), call("b", 7, 1, 2)],
        2: [call("b", 6, 1, 2, done=True)],
    }
    assert find_holdup(calls) == ({2}, "has not entered b of it, in which others wait")


def test_a_rank_that_has_called_no_collective_of_a_group_is_absent():
    assert find_holdup({0: [call("a", 1, 0, 1)], 1: []}) == (
        {1},
        "has not entered a of it, in which others wait",
    )


def test_members_of_a_large_group_are_those_that_have_called_it():
    calls = {0: [call("a", 2)], 1: [call("a", 1, done=True)], 2: [call("b", 1, 2, done=True)]}
    assert find_holdup(calls) == ({1}, "has not entered a of it, in which others wait")


def test_a_device_that_has_not_begun_what_all_ranks_have_called_is_named():
    calls = {0: [call("a", 3, 0, 1, begun=True)], 1: [call("a", 3, 0, 1)]}
    assert find_holdup(calls) == ({1}, "has called a of it, which its device has not begun")


def test_what_has_ended_or_begun_everywhere_holds_nobody_up():
    assert find_holdup({0: [call("a", 3, 0, 1, done=True)], 1: []}) is None
    begun = call("a", 3, 0, 1, begun=True)
    assert find_holdup({0: [begun], 1: [begun]}) is None
    assert find_holdup({0: [], 1: []}) is None


def _look_while_groups_come_and_go() -> int:
    """The number of looks, each of which a group that is being made or ended could disturb."""
    looks, is_over = 0, threading.Event()

    def make_groups() -> None:
        for _ in range(40):
            group = dist.new_group([0])
            dist.all_reduce(torch.ones(1), group=group)
            dist.destroy_process_group(group)
        is_over.set()

    making = threading.Thread(target=make_groups)
    making.start()
    while not is_over.is_set():
        latest_calls()
        looks += 1
    making.join()
    return looks


def test_groups_that_are_made_and_ended_meanwhile_do_not_end_the_watchdog():
    [looks] = run_ranks(_look_while_groups_come_and_go, 1)
    assert looks > 40


def test_records_that_cannot_be_read_do_not_keep_a_hung_rank(tmp_path, monkeypatch):
    """And the stacks say when they were written: those of a dead rank are of an earlier hang."""

    def broken(path: Path) -> None:
        raise json.JSONDecodeError("not JSON", "", 0)

    monkeypatch.setattr(hang_files, "write_records", broken)
    reason = hang_files.write_hang_files(tmp_path, 3, with_collectives=True)
    assert "not JSON" in (reason or "")
    first, *stack = (tmp_path / "stacks_rank_00003.txt").read_text().splitlines()
    assert datetime.fromisoformat(first.partition(", ")[0]).tzinfo is not None
    assert f"rank 3, process {os.getpid()} on " in first
    assert any("in write_hang_files" in line for line in stack)
