"""The time a device takes for its passes: without waits for others, and never waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from parallel import megatron
from pretrain.errors import EXIT_COMPLETED
from pretrain.supervision.pass_timer import CountedPasses, HostClock, PassTimer
from pretrain.supervision.watchdog import Watchdog
from tests.distributed import run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import tiny_run, write_data

DELAY = 0.3  # seconds by which a rank is late


class _Device:
    """A clock whose device does what it is given when the test says so, a second for each mark.

    As CUDA's events, marks that are not reached cannot be read.
    """

    def __init__(self) -> None:
        self.given = self.done = 0
        self.read: list[int] = []

    def mark(self) -> int:
        self.given += 1
        return self.given

    def queue(self) -> object:
        return None

    def is_reached(self, mark: int) -> bool:
        return mark <= self.done

    def seconds(self, begin: int, end: int) -> float:
        assert max(begin, end) <= self.done, "waits for the device"
        self.read += begin, end
        return end - begin


def _step(timer: PassTimer, *, micro_batches: int = 2) -> None:
    with timer.step(micro_batches):
        for _ in range(micro_batches):
            for phase in ("data", "forward", "backward", "optimizer"):
                with timer(phase):
                    pass


def test_marks_are_read_in_a_later_step_and_not_waited_for():
    device = _Device()
    timer = PassTimer(device, CountedPasses())
    _step(timer)
    assert (device.given, timer.read()) == (8, [])
    device.done = 7  # all passes but the end of the last
    _step(timer)
    assert timer.read() == []
    device.done = 8
    assert timer.read() == [4.0]
    assert timer.read() == []
    device.done = 16
    assert timer.read() == [4.0]
    assert sorted(device.read) == list(range(1, 17)), "each mark is read once, to be used again"


def test_a_device_that_is_far_behind_is_given_no_more_marks():
    device = _Device()
    timer = PassTimer(device, CountedPasses())
    for _ in range(20):
        _step(timer)
    assert device.given == 4 * 8
    device.done = device.given
    assert timer.read() == [4.0] * 4
    _step(timer)
    assert device.given == 5 * 8


def test_the_first_passes_stand_for_a_step_of_many():
    device = _Device()
    timer = PassTimer(device, CountedPasses())
    _step(timer, micro_batches=30)
    device.done = device.given
    assert (device.given, timer.read()) == (16, [60.0])


@pytest.mark.parametrize(
    ("counted", "micro_batches", "seconds"),
    [
        (CountedPasses(last_backward=False), 1, 1.0),
        (CountedPasses(last_backward=False), 3, 6.0),
        (CountedPasses(backward=False), 3, 3.0),
    ],
)
def test_passes_with_other_waits_are_left_out(counted, micro_batches, seconds):
    device = _Device()
    timer = PassTimer(device, counted)
    _step(timer, micro_batches=micro_batches)
    device.done = device.given
    assert timer.read() == [seconds]


def _gather(x: torch.Tensor) -> None:
    dist.all_gather_into_tensor(torch.empty(2 * len(x)), x)


def _exchange(x: torch.Tensor) -> None:
    dist.all_to_all_single(torch.empty_like(x), x)


def _later(x: torch.Tensor) -> None:
    work = dist.all_reduce(x, async_op=True)
    work.wait()


def _backward(x: torch.Tensor) -> None:
    """Megatron-Core's all-reduce of the gradient, beside that of the weight."""
    weight = torch.ones(4, 8, requires_grad=True)
    y = x.view(1, 1, 8).requires_grad_()
    group = dist.group.WORLD
    megatron.column_linear(y, weight, None, group=group, sequence_parallel=False).sum().backward()


_WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "all_reduce": dist.all_reduce,
    "all_gather": _gather,
    "all_to_all": _exchange,
    "asynchronous": _later,
    "backward": _backward,
}


def _waited() -> dict[str, tuple[float, float]]:
    """(seconds of a pass, seconds of it that count) by kind of wait for rank 1, which is late."""
    megatron.prepare_megatron()
    found = {}
    for name, wait in _WAITS.items():
        timer = PassTimer(HostClock(), CountedPasses())
        dist.barrier()
        if dist.get_rank() == 1:
            time.sleep(DELAY)
        began = time.perf_counter()
        with timer.step(1), timer("forward"):
            wait(torch.ones(8))
        [own] = timer.read()
        found[name] = time.perf_counter() - began, own
    assert dist.ProcessGroup.allreduce.__module__ != "pretrain.supervision.pass_timer"
    return found


def test_waits_for_other_ranks_are_no_work_of_the_device():
    """Collectives as ours, DeepSpeed's and Megatron-Core's, in forward and backward passes."""
    on_time, _ = run_ranks(_waited, 2)
    assert set(on_time) == set(_WAITS)
    for name, (whole, own) in on_time.items():
        assert whole - own > DELAY / 2, name


def _train(config) -> list[tuple[float, float]]:
    """(seconds of a step, those of the device) of each step; rank 0 is late in every step."""
    usual, reported, began = Watchdog.add_device_seconds, [], [0.0]
    progress = Watchdog.progress

    def begin(self, activity: str, *, is_step: bool = False) -> None:
        progress(self, activity, is_step=is_step)
        if is_step:
            began[0] = time.perf_counter()
            if self._rank == 0:
                time.sleep(DELAY)

    def report(self, seconds) -> None:
        seconds = list(seconds)
        reported.extend((time.perf_counter() - began[0], each) for each in seconds)
        usual(self, seconds)

    Watchdog.progress, Watchdog.add_device_seconds = begin, report  # type: ignore[method-assign]
    assert run_training(config) == EXIT_COMPLETED
    return reported


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_a_run_times_its_passes_without_the_wait_for_a_late_rank(layout, tmp_path):
    write_data(tmp_path)
    config = tiny_run(
        tmp_path,
        training__max_steps=2,
        training__gradient_accumulation_steps=2,
        parallel={layout: 2},
    )
    _, on_time = run_ranks(_train, 2, config, init=False)
    assert len(on_time) == 2
    for whole, own in on_time:
        assert own > 0
        assert whole - own > DELAY / 2
