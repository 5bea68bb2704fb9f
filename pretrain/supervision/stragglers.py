"""Finds ranks that do their own work much slower than others and so slow down the whole run.

In a step ranks wait for each other, so that all take as long as the slowest. What tells them apart
is the time in which a rank does not wait. The watchdog's thread looks fifty times a second at what
the main thread is in: a function of torch.distributed, or anything else. The step does nothing for
it and waits for no device. It sees what keeps the host busy (data, Python, a CPU that is shared or
throttled), but not a slow device, for which the hosts of all ranks wait alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median_low
from typing import NamedTuple

from pretrain.supervision.progress import Progress

SAMPLING_INTERVAL = 0.02  # seconds
_MIN_STEPS = 7  # of a window, at least
_MIN_SECONDS = (
    2.0  # of a window, at least: of fewer samples a half and a whole cannot be told apart
)
_MIN_SHARE = 0.2  # of a step that a rank must lose to the usual one to be called slow


class BusyTimer:
    """The seconds a step in which one rank did not wait for others, window by window."""

    def __init__(self) -> None:
        self.window, self.busy = 0, 0.0  # windows that have ended, and the seconds of the last
        self.seconds_per_step = 0.0  # of the last window, waiting included
        self._begin(steps=0)

    def _begin(self, *, steps: int) -> None:
        self._first_step, self._busy, self._seconds = steps, 0.0, 0.0

    def add(self, seconds: float, *, is_busy: bool, steps: int) -> bool:
        """A sample of a step: what the main thread did in the last `seconds`, `steps` steps into
        the run. Returns whether it ended a window."""
        self._seconds += seconds
        self._busy += seconds * is_busy
        done = steps - self._first_step
        if done < _MIN_STEPS or self._seconds < _MIN_SECONDS:
            return False
        self.window += 1
        self.busy, self.seconds_per_step = self._busy / done, self._seconds / done
        self._begin(steps=steps)
        return True


class Straggler(NamedTuple):
    """A rank that takes `ratio` times as long for its own work as is usual in its stage."""

    rank: int
    ratio: float
    usual: float  # seconds a step


class StragglerDetector:
    """Compares the paces of all ranks; the ranks of a pipeline stage are alike, stages are not.

    A rank is slow that exceeds `ratio` in two windows in a row, and by a share of the step that
    matters.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self.largest: float | None = None  # the largest ratio of any rank in the last windows
        self._suspects: dict[int, int] = {}  # rank -> the window in which it was slow
        self._reported: set[int] = set()

    def compare(self, ranks: Mapping[int, Progress], *, seconds_per_step: float) -> list[Straggler]:
        """Those that have just turned out to be slow."""
        stages: dict[int, dict[int, Progress]] = {}
        for rank, progress in ranks.items():
            if progress.window:
                stages.setdefault(progress.stage, {})[rank] = progress
        slow, largest = [], 0.0
        for stage in stages.values():
            # The lower of two: of two ranks the slow one must not be its own measure.
            usual = median_low(progress.busy for progress in stage.values())
            for rank, progress in stage.items():
                each = Straggler(rank, progress.busy / max(usual, 1e-9), usual)
                matters = progress.busy - usual >= _MIN_SHARE * seconds_per_step
                largest = max(largest, each.ratio if matters else 1.0)
                if self._is_slow(rank, progress.window, each.ratio >= self._ratio and matters):
                    slow.append(each)
        self.largest = largest or None
        return slow

    def _is_slow(self, rank: int, window: int, exceeds: bool) -> bool:
        if not exceeds:
            self._suspects.pop(rank, None)
            self._reported.discard(rank)  # if it is slow again, that is news
            return False
        before = self._suspects.setdefault(rank, window)
        if before == window or rank in self._reported:
            return False
        self._reported.add(rank)
        return True
