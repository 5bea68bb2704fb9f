"""Stop a run when the scheduler or the user asks for it: between two steps, or while it starts."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pretrain.errors import EXIT_STOPPED
from pretrain.ranks import Ranks

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class GracefulStop:
    """Turns the signals that ask for a stop into an answer of `should_stop`; a context manager.

    The handler only notes the signal, so that one arriving in the middle of a save or a collective
    call interrupts nothing, however often it comes: launchers pass on what a terminal has already
    sent to every process. Leaving the context restores the old handlers.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> GracefulStop:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def should_stop(self, ranks: Ranks) -> bool:
        """Whether any rank was signalled; collective, so that all ranks stop after the same step.

        It costs one all-reduce of four bytes over gloo and leaves the accelerator's queue alone.
        """
        return ranks.any(self.received is not None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """While a run starts there is nothing to save: a signal ends the process, with EXIT_STOPPED.

    At once, also where the main thread waits in C for other ranks, in which Python runs no handler.
    What was ignored stays ignored: job scripts ask again and again, until ranks listen. Inside,
    GracefulStop takes over.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    asked_for = [n for n in STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, _leave_to_thread) for number in asked_for}
    old_descriptor = signal.set_wakeup_fd(writer)
    threading.Thread(target=_end_on, args=(reader,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_descriptor)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(writer)  # ends the thread


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """Only signals with a handler of Python's are written to the descriptor."""


def _end_on(reader: int) -> None:
    while data := os.read(reader, 1):
        if signal.getsignal(data[0]) is _leave_to_thread:
            name = signal.Signals(data[0]).name
            rank = os.environ.get("RANK", "0")
            sys.stderr.write(
                f"rank {rank}: {name} while the run was starting: nothing to save; start again "
                "to continue\n"
            )
            sys.stderr.flush()
            os._exit(EXIT_STOPPED)
    os.close(reader)
