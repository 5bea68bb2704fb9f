"""Detection of stragglers: ranks whose own work is much slower and slows down the whole run.

Ranks wait for each other in every step, so all of them take as long as the slowest. They differ in
the time they do not wait. The watchdog thread samples the main thread fifty times a second: it is
inside torch.distributed, or busy. Sampling sees what keeps the host busy (data, Python, a CPU that
is shared or throttled), but not a slow device, for which the hosts of all ranks wait alike. That is
seen by the time the device itself takes for forward and backward passes (`pass_timer`).
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median_low
from typing import NamedTuple

from pretrain.supervision.progress import Progress

SAMPLING_INTERVAL = 0.02  # seconds
_MIN_STEPS = 7  # per window
_MIN_SECONDS = 2.0  # per window: with fewer samples, half and full speed look alike
_MIN_SHARE = 0.2  # of a step that a rank must lose to the median before it counts as slow


class BusyTimer:
    """Seconds per step in which a rank did not wait for others, per window of steps."""

    def __init__(self) -> None:
        self.window, self.busy = 0, 0.0  # completed windows, seconds of the last one
        self.seconds_per_step = 0.0  # of the last window, including waits
        self._begin(steps=0)

    def _begin(self, *, steps: int) -> None:
        self._first_step, self._busy, self._seconds = steps, 0.0, 0.0

    def add(self, seconds: float, *, is_busy: bool, steps: int) -> bool:
        """Add a sample: whether the main thread was busy in the last `seconds`, `steps` steps into
        the run. Returns whether it completed a window."""
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
    """A rank whose own work, or whose device's, takes `ratio` times the median of its pipeline
    stage."""

    rank: int
    whose: str
    seconds: float  # a step
    usual: float
    ratio: float

    def describe(self, progress: Progress) -> str:
        return (
            f"rank {self.rank} {progress.summary} is slow: {self.seconds:.3g} s of {self.whose} "
            f"work per step, {self.ratio:.1f} times the {self.usual:.3g} s that are usual in its "
            "stage"
        )


# Fields of Progress that are compared, and whose work they are.
_MEASURES = {"busy": "its own", "device": "its device's own"}


class StragglerDetector:
    """Compares the work of all ranks within each pipeline stage; stages differ by nature.

    A straggler exceeds `ratio` in two consecutive windows, and loses at least `_MIN_SHARE` of a
    step by it.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self.largest: float | None = None  # the largest ratio of any rank in its last window
        self._suspects: dict[int, int] = {}  # rank -> the window in which it was slow
        self._reported: set[int] = set()

    def compare(self, ranks: Mapping[int, Progress], *, seconds_per_step: float) -> list[Straggler]:
        """The stragglers found since the last call."""
        stages: dict[int, dict[int, Progress]] = {}
        for rank, progress in ranks.items():
            if progress.window:
                stages.setdefault(progress.stage, {})[rank] = progress
        slow, largest = [], 0.0
        for stage in stages.values():
            worst = _slowest_measures(stage, lost=_MIN_SHARE * seconds_per_step)
            for rank, each in worst.items():
                largest = max(largest, each.ratio)
                if self._is_slow(rank, stage[rank].window, each.ratio >= self._ratio):
                    slow.append(each)
        self.largest = largest or None
        return slow

    def _is_slow(self, rank: int, window: int, exceeds: bool) -> bool:
        if not exceeds:
            self._suspects.pop(rank, None)
            self._reported.discard(rank)  # reported again if it becomes slow again
            return False
        before = self._suspects.setdefault(rank, window)
        if before == window or rank in self._reported:
            return False
        self._reported.add(rank)
        return True


def _slowest_measures(stage: Mapping[int, Progress], *, lost: float) -> dict[int, Straggler]:
    """Of each rank the measure in which it is slowest; its ratio is 1 unless it loses `lost` s."""
    worst: dict[int, Straggler] = {}
    for name, whose in _MEASURES.items():
        taken = {rank: getattr(progress, name) for rank, progress in stage.items()}
        if name == "device" and not all(taken.values()):  # not known of every rank
            continue
        # The lower median: of two ranks the slow one must not be the reference.
        usual = median_low(taken.values())
        for rank, seconds in taken.items():
            ratio = seconds / max(usual, 1e-9) if seconds - usual >= lost else 1.0
            if rank not in worst or ratio > worst[rank].ratio:
                worst[rank] = Straggler(rank, whose, seconds, usual, ratio)
    return worst
