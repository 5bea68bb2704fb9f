"""Graceful stop on the signals of a scheduler or a user, between steps or during start-up."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from pretrain.errors import EXIT_STOPPED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class GracefulStop:
    """Context manager that records the first stop signal as `received`.

    The handler only records the signal, so one that arrives during a save or a collective
    interrupts nothing, however often it is repeated: launchers forward what a terminal has already
    sent to every process. Leaving the context restores the previous handlers.

    With `starting` there is nothing to save until `started` is called, and a signal ends the
    process with EXIT_STOPPED at once, even while the main thread waits in C for other ranks, where
    Python runs no handlers. Ignored signals stay ignored: job scripts repeat their request until
    ranks handle it.

    `last_step`: a step after which a stop is asked for without a signal.
    """

    def __init__(self, *, starting: bool = False) -> None:
        self.received: signal.Signals | None = None
        self.last_step: int | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._starting, self._writer, self._old_writer = starting, -1, -1

    def __enter__(self) -> GracefulStop:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.getsignal(number)
            if not (self._starting and self._previous[number] is signal.SIG_IGN):
                signal.signal(number, self._note)
        if self._starting:
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._old_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            thread = threading.Thread(target=self._listen, args=(reader,), daemon=True)
            thread.name = "signals"
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        if self._writer >= 0:
            signal.set_wakeup_fd(self._old_writer)
            os.close(self._writer)  # ends the thread
            self._writer = -1

    def started(self) -> None:
        """End of start-up: from now on signals are only recorded."""
        self._starting = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)

    def _listen(self, reader: int) -> None:
        """Read signal numbers from the wake-up pipe, which C writes to on arrival."""
        while data := os.read(reader, 1):
            if self._starting:
                sys.stderr.write(
                    f"rank {os.environ.get('RANK', '0')}: {signal.Signals(data[0]).name} while the "
                    "run was starting: nothing to save; start again to continue\n"
                )
                sys.stderr.flush()
                os._exit(EXIT_STOPPED)
        os.close(reader)
