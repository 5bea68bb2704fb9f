from __future__ import annotations

import os
import signal
import time

import pytest

from pretrain.distributed.consensus import RankGroup
from pretrain.supervision.signals import GracefulStop
from tests.distributed import run_ranks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_asks_for_a_stop_and_interrupts_nothing(number: signal.Signals) -> None:
    with GracefulStop() as stop:
        assert stop.received is None
        for _ in range(3):  # impatient schedulers send it again
            os.kill(os.getpid(), number)
        time.sleep(0)  # the handler runs between two bytecodes of this thread
        assert stop.received == number


def test_the_first_signal_is_the_one_that_is_reported() -> None:
    with GracefulStop() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
        assert stop.received == signal.SIGUSR1


def test_the_old_handlers_are_back_afterwards() -> None:
    seen: list[int] = []
    old = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with GracefulStop():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == []
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0)
        assert seen == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, old)


def steps_until_stop(signalled_rank: int, signalled_step: int) -> int:
    ranks = RankGroup.of_world(timeout=None)
    with GracefulStop() as stop:
        for step in range(1, 100):
            if (ranks.rank, step) == (signalled_rank, signalled_step):
                os.kill(os.getpid(), signal.SIGTERM)
            if ranks.any(stop.received is not None) == [True]:
                return step
    return -1


@pytest.mark.parametrize("rank", [0, 2])
def test_a_signal_to_one_rank_stops_all_ranks_after_the_same_step(rank: int) -> None:
    assert run_ranks(steps_until_stop, 3, rank, 5) == [5, 5, 5]
