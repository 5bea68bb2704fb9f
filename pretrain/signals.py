"""Stop a run between two steps when the scheduler asks for it."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from pretrain.ranks import Ranks

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class GracefulStop:
    """Turns SIGTERM and SIGUSR1 into an answer of `should_stop`; a context manager.

    The handler only notes the signal, so that one arriving in the middle of a save or a collective
    call interrupts nothing, however often it comes. Leaving the context restores the old handlers.
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
