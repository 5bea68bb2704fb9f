"""The rank that blocks the others, from the progress of all ranks."""

from __future__ import annotations

import sys
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from pretrain.supervision.pass_timer import _around_collectives
from pretrain.supervision.progress import Progress, blame, is_waiting, locate_thread
from tests.distributed import run_ranks

ALIKE = [
    Progress("host", 10 + rank, beats=5, num_activities=7, activity="step 3", place=f"data {rank}")
    for rank in range(4)
]
BEFORE = dict(enumerate(ALIKE))
ALL_REDUCE, STEP = "all_reduce of ranks 0, 1, 2, 3", "train_step (pretrain/engine/engine.py:1)"


def _after(**changes: dict[str, object]) -> dict[int, Progress]:
    """All ranks have beaten once more and wait in the same all-reduce, but for `changes`."""
    usual = {
        rank: p._replace(beats=6, collective=ALL_REDUCE, function=STEP)
        for rank, p in BEFORE.items()
    }
    return usual | {
        int(name[-1]): usual[int(name[-1])]._replace(**values) for name, values in changes.items()
    }


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        (
            {"r1": {"beats": 5}},
            "rank 1 (process 11 on host, data 1, last heard of in step 3) does not answer",
        ),
        (
            {"r2": {"collective": "", "function": "__next__ (data_tools/loading/loader.py:9)"}},
            "rank 2 (process 12 on host, data 2, in step 3) is in __next__ "
            "(data_tools/loading/loader.py:9) "
            f"and has not entered {ALL_REDUCE}, in which others wait",
        ),
        ({"r2": {"num_activities": 6, "activity": "step 2"}}, "in step 2) is in all_reduce"),
        (
            {"r3": {"collective": "barrier of all ranks"}},
            "rank 3 (process 13 on host, data 3, in step 3) is in barrier of all ranks, called by "
            f"{STEP} while others are in {ALL_REDUCE}",
        ),
        ({}, "all ranks are equally far and in all_reduce"),
    ],
    ids=["silent", "not in the collective", "behind", "in another collective", "alike"],
)
def test_who_is_to_blame(changes, verdict):
    assert verdict in blame(BEFORE, _after(**changes), own_rank=0)


def _watch_a_wait(call: str, is_timed: bool) -> tuple[bool, tuple[str, str]]:
    """The location of a main thread that waits for rank 1, as seen by another thread."""
    seen = []
    if dist.get_rank() == 0:
        main = threading.get_ident()

        def look() -> None:
            seen.append((is_waiting(sys._current_frames()[main]), locate_thread(main)))

        threading.Timer(0.3, look).start()
    else:
        threading.Event().wait(0.6)
    with _around_collectives(nullcontext) if is_timed else nullcontext():
        if call == "recv":
            dist.recv(torch.ones(1), 1) if dist.get_rank() == 0 else dist.send(torch.ones(1), 0)
        else:
            dist.all_reduce(torch.ones(1))
    return seen[0] if seen else (False, ("", ""))


@pytest.mark.parametrize("is_timed", [False, True], ids=["", "timed"])
@pytest.mark.parametrize(
    ("call", "named"), [("all_reduce", "all_reduce of all ranks"), ("recv", "recv from rank 1")]
)
def test_a_main_thread_that_waits_for_others_is_seen_with_the_call_and_its_ranks(
    call, named, is_timed
):
    (waits, (function, collective)), _ = run_ranks(_watch_a_wait, 2, call, is_timed)
    assert waits
    assert collective == named
    assert "pass_timer" not in function


def test_a_main_thread_that_works_is_not_taken_for_one_that_waits():
    assert not is_waiting(sys._getframe())
    assert locate_thread(threading.get_ident())[1] == ""
