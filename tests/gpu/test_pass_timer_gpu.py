"""The time of passes by events of the device, which the host reads and never waits for."""

from __future__ import annotations

import time

import pytest
import torch

from pretrain.supervision.pass_timer import CountedPasses, PassTimer, pass_timer
from tests.gpu.device import DEVICE


def _work(amount: int) -> None:
    """Keep the device busy in proportion to `amount`, for a tenth of a second or so at 1."""
    if DEVICE.type == "cuda":
        torch.cuda._sleep(amount * 200_000_000)  # cycles
    else:
        time.sleep(0.05 * amount)


def _steps(timer: PassTimer, amounts: list[int]) -> None:
    for amount in amounts:
        with timer.step(1), timer("forward"):
            _work(amount)


def test_passes_are_timed_as_the_device_takes_them():
    timer = pass_timer(DEVICE, CountedPasses())
    _steps(timer, [1])  # the first makes the events
    _drain(timer)
    _steps(timer, [1, 4])
    short, long = _drain(timer)
    assert 3 < long / short < 5


def _drain(timer: PassTimer) -> list[float]:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return timer.read()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a CPU has done its work when the host goes on")
def test_neither_a_step_nor_reading_waits_for_the_device():
    timer = pass_timer(DEVICE, CountedPasses())
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            _steps(timer, [4])
            assert timer.read() == []  # it works for half a second, and the host is here already
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(_drain(timer)) == 3
