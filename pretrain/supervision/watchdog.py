"""Watchdog: ends a run that hangs or has lost a rank, and names that rank.

A collective waits for its last rank, for half an hour or for ever. Here every rank has a watchdog
thread that reports the progress of its main thread through the store of the rendezvous. The first
watchdog whose main thread makes no progress for `timeout` seconds compares all ranks and publishes
a verdict. The others wait for it: a thousand that compared at once would be more than the store
answers. All ranks then write their stacks to the run directory and exit, so that the launcher ends
the job and a scheduler can restart it.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist

from parallel.checkpoint.errors import AgreedError, one_line
from pretrain.errors import EXIT_HUNG, EXIT_LOST_RANK, ConfigError, LostRankError
from pretrain.supervision.flight_recorder import latest_calls
from pretrain.supervision.hang_files import NAMES, write_collectives, write_hang_files
from pretrain.supervision.heartbeats import LocalPeers, RunRecord
from pretrain.supervision.progress import (
    Progress,
    blame,
    describe_silent,
    is_waiting,
    locate_thread,
    resident_gib,
    silent_ranks,
)
from pretrain.supervision.stragglers import (
    SAMPLING_INTERVAL,
    BusyTimer,
    StragglerDetector,
)

_OBSERVATION_SECONDS = 1.0  # between two snapshots of all heartbeats
_DRAIN_SECONDS = 2.0  # a rank outlives its verdict, so that others can read it and act
_PEER_EXIT_SECONDS = 3.0  # for ranks to exit by themselves after a peer has
_UNWIND_SECONDS = 20.0  # for an error to unwind the main thread
_JUDGING_SECONDS = 10.0  # until another rank judges in the place of one that does not
_VERDICT, _FAILURE, _JUDGE = "verdict", "failure", "judge"
# Parts of gloo's and NCCL's messages when a peer is gone; both raise plain RuntimeErrors.
_CONNECTION_ERRORS = (
    "gloo",
    "pair closure",
    "NCCL",
    "Connection reset",
    "Connection closed",
    "Broken pipe",
)


class Ending(NamedTuple):
    """Exit code and message of a rank that the watchdog ends; None: another rank reports it."""

    code: int
    message: str | None


class Watchdog:
    """Context manager that watches the main thread of one rank.

    The main thread calls `progress` at every new activity, which costs no communication. `store`
    is that of the whole run, needed if `size` is more than 1. `end` is called with the `Ending` of
    the rank; by default it ends the process. `timeout` in seconds; None: watch nothing.
    `slow_ratio`: see StragglerDetector; None: compare nothing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int = 0,
        size: int = 1,
        store: dist.Store | None = None,
        timeout: float | None,
        slow_ratio: float | None = None,
        end: Callable[[Ending], object] | None = None,
    ) -> None:
        self._folder, self._rank, self._timeout = folder, rank, timeout
        self._end = end or _end_process
        self._interval = min(1.0, (timeout or 1.0) / 5)
        self._record = (
            None if store is None or size == 1 else RunRecord(store, rank=rank, size=size)
        )
        self._local_peers = LocalPeers(rank=rank, size=size)
        # Written by the main thread and by the watchdog thread; each has its own.
        self._reported = Progress.of_this_process()
        self._sampled: dict[str, Any] = {}
        self._main, self._last_progress = threading.get_ident(), time.monotonic()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._exiting = False  # the main thread is at the end of the run, or raised an error
        self._failure: str | None = None  # error of another rank, as that rank reported it
        self._peer_lost_at: float | None = None  # when the exit of another rank was noticed
        self._steps, self._in_step, self._busy_timer = 0, False, BusyTimer()
        # Seconds per step, from the main thread to the watchdog's.
        self._device_seconds: deque[float] = deque(maxlen=1000)
        self._comparisons_left = 0
        self._num_absent_judges = 0
        self._judge_seen_at: float | None = None
        self._stragglers: StragglerDetector | None = None
        if slow_ratio is not None and self._record is not None:
            self._stragglers = StragglerDetector(slow_ratio)

    def __enter__(self) -> Watchdog:
        if self._timeout is not None:
            self.progress("starting")
            with contextlib.suppress(RuntimeError, TimeoutError):
                self._exchange()  # at once: a rank may exit before its thread's first heartbeat
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        self._local_peers.close()

    @property
    def _own(self) -> Progress:
        return self._reported._replace(**self._sampled)

    @property
    def slowest_ratio(self) -> float | None:
        """Busy time of the slowest rank over the median of its stage; known on rank 0 only."""
        return None if self._stragglers is None else self._stragglers.largest

    @property
    def compares_ranks(self) -> bool:
        """Whether stragglers are looked for."""
        return self._stragglers is not None

    def add_device_seconds(self, seconds: Iterable[float]) -> None:
        """Report steps in which this rank's device worked for so long, each."""
        self._device_seconds.extend(seconds)

    def set_layout(self, place: str, *, stage: int) -> None:
        """Set the position of this rank in the layout; ranks of one stage are compared."""
        self._reported = self._reported._replace(place=place, stage=stage)

    def progress(self, activity: str, *, is_step: bool = False) -> None:
        """Report that the main thread begins `activity`, such as "step 12"."""
        number = self._reported.num_activities + 1
        self._reported = self._reported._replace(num_activities=number, activity=activity, part="")
        self._last_progress, self._in_step = time.monotonic(), is_step
        self._steps += is_step

    def advance(self, part: str) -> None:
        """Report that the main thread begins `part` of its activity, such as "block_3".

        An activity that takes long with a large model is told in parts, each of which has
        `timeout`. Ranks may differ in the number of theirs, so parts do not count in comparisons.
        """
        self._reported = self._reported._replace(part=part)
        self._last_progress = time.monotonic()

    def on_exit(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Exit hook, called while the groups still exist.

        On an error of this rank's own, report it to the other ranks; on a failed collective, find
        out which rank caused it.

        Raises:
            LostRankError: a collective has failed because another rank ended.
        """
        is_exiting, self._exiting = self._exiting, True
        if is_exiting or self._record is None or self._thread is None:
            return
        if not isinstance(error, Exception):
            return
        self.progress(f"exiting after an error in {self._own.activity}")
        if isinstance(error, RuntimeError) and any(
            text in str(error) for text in _CONNECTION_ERRORS
        ):
            cause = self._find_cause()
            if cause is not None:
                raise LostRankError(
                    cause.message or "", is_reported=cause.message is None
                ) from error
        elif not isinstance(error, (AgreedError, ConfigError)):
            # The error itself is what has to be told.
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                write_collectives(self._folder, self._rank)
            with contextlib.suppress(RuntimeError, TimeoutError):
                self._record.set_flag_once(_FAILURE, f"rank {self._rank}: {one_line(error)}")
            if self._rank == 0:  # it may own the store, and the others have yet to read it
                time.sleep(2 * self._interval)

    def _find_cause(self) -> Ending | None:
        """Find which rank is gone; None if that cannot be determined."""
        deadline = time.monotonic() + _PEER_EXIT_SECONDS
        while time.monotonic() < deadline:
            found = self._lost_peer()
            if found is not None:
                return found
            time.sleep(0.05)
        return self._find_silent_peers()

    def _lost_peer(self) -> Ending | None:
        if self._record is None:
            return None
        with contextlib.suppress(RuntimeError, TimeoutError):
            self._exchange()
        if self._failure is not None:
            return Ending(EXIT_LOST_RANK, None)
        ended = self._local_peers.ended()
        if not ended:
            return None
        message = self._local_peers.describe(ended, self._record)
        return Ending(EXIT_LOST_RANK, message if self._local_peers.is_reporter(ended) else None)

    def _find_silent_peers(self) -> Ending | None:
        """Find ranks, of other machines too, that no longer send heartbeats."""
        assert self._record is not None
        try:
            before = self._record.read()
            self._observe_heartbeats()
            after = self._record.read()
        except (RuntimeError, TimeoutError):
            message = f"{self._record.store_owner} does not answer"
            return Ending(EXIT_LOST_RANK, message if self._rank <= 1 else None)
        gone = silent_ranks(before, after, own_rank=self._rank)
        if not gone:
            return None
        text = describe_silent(gone)
        return Ending(EXIT_LOST_RANK, text if self._record.set_flag_once(_FAILURE, text) else None)

    def _watch(self) -> None:
        ending, reported, sampled = None, 0.0, time.monotonic()
        # A private generator: the state of the global one is saved and restored with the run.
        jitter = random.Random()
        while ending is None:
            # Jittered, so that samples do not align with the steps.
            often = SAMPLING_INTERVAL * jitter.uniform(0.5, 1.5)
            samples = self._stragglers is not None and self._in_step
            if self._closing.wait(min(often, self._interval) if samples else self._interval):
                return
            now = time.monotonic()
            self._sample(now - sampled)
            sampled = now
            if now - reported >= self._interval:
                ending, reported = self._check(), time.monotonic()
        self._finish(ending)

    def _sample(self, seconds: float) -> None:
        if self._stragglers is None or self._record is None or not self._in_step:
            return
        busy = not is_waiting(sys._current_frames().get(self._main))
        if not self._busy_timer.add(seconds, is_busy=busy, steps=self._steps):
            return
        self._sampled = {
            **self._sampled,
            "window": self._busy_timer.window,
            "busy": self._busy_timer.busy,
            "device": self._mean_device_seconds(),
        }
        self._comparisons_left = 2  # comparisons: the others report their window about now
        with contextlib.suppress(RuntimeError, TimeoutError):
            self._record.report(self._own)

    def _mean_device_seconds(self) -> float:
        """Per step, of the steps reported since the last call; 0 if there are none."""
        reported = [self._device_seconds.popleft() for _ in range(len(self._device_seconds))]
        return sum(reported) / max(len(reported), 1)

    def _compare(self) -> None:
        """Warn about stragglers, on rank 0."""
        if (
            self._stragglers is None
            or self._record is None
            or not self._comparisons_left
            or self._rank > 0
        ):
            return
        self._comparisons_left -= 1
        everyone = self._record.read()
        for slow in self._stragglers.compare(
            everyone, seconds_per_step=self._busy_timer.seconds_per_step
        ):
            sys.stderr.write(f"warning: {slow.describe(everyone[slow.rank])}\n")
            sys.stderr.flush()

    def _check(self) -> Ending | None:
        """Send a heartbeat; returns the verdict that ends this rank, if there is one."""
        waited = time.monotonic() - self._last_progress
        assert self._timeout is not None
        self._sample_position(is_stuck=waited > self._timeout / 2)
        answers, found = True, None
        try:
            found = self._exchange()
            self._compare()
        except (RuntimeError, TimeoutError):  # reported below, if it matters
            answers = False
        limit = max(self._timeout, _UNWIND_SECONDS) if self._exiting else self._timeout
        if found is None and waited > limit:
            found = self._declare_hang(waited, answers=answers)
        return found or self._check_peers()

    def _sample_position(self, *, is_stuck: bool) -> None:
        function, collective = locate_thread(self._main) if is_stuck else ("", "")
        self._sampled = {
            **self._sampled,
            "beats": self._own.beats + 1,
            "function": function,
            "collective": collective,
            "calls": latest_calls() if is_stuck and dist.is_initialized() else (),
            "memory_gib": resident_gib(),
        }

    def _exchange(self) -> Ending | None:
        if self._record is None:
            return None
        self._record.report(self._own)
        self._local_peers.attach(self._record, self._own)
        if self._record.get_flag(_VERDICT) is not None:
            return Ending(EXIT_HUNG, None)
        self._failure = self._failure or self._record.get_flag(_FAILURE)
        return None

    def _check_peers(self) -> Ending | None:
        """After the exit of another rank, give the main thread time to notice it by itself."""
        if self._exiting or not (self._failure or self._local_peers.ended()):
            return None
        self._peer_lost_at = self._peer_lost_at or time.monotonic()
        over = time.monotonic() - self._peer_lost_at > _PEER_EXIT_SECONDS
        return self._lost_peer() if over else None

    def _declare_hang(self, waited: float, *, answers: bool) -> Ending | None:
        what = f"no progress in {self._own.where} for {waited:.0f} s"
        what += f" (watchdog.timeout is {self._timeout:g}): "
        if self._record is None:
            where = f"{self._own.function}; there is no other rank"
            return Ending(EXIT_HUNG, f"{what}the main thread is in {where}")
        try:
            if not answers:
                raise TimeoutError
            if not self._is_judge():
                return None  # `_exchange` will find the verdict of the rank that is
            before = self._record.read()
            self._observe_heartbeats()
            culprit = blame(before, self._record.read(), own_rank=self._rank)
            is_first = self._record.set_flag_once(_VERDICT, f"rank {self._rank}: {what}{culprit}")
            return Ending(EXIT_HUNG, f"{what}{culprit}" if is_first else None)
        except (RuntimeError, TimeoutError):
            # Ranks cannot agree on who reports it. The store's owner sees the verdict if it wakes.
            message = f"{what}{self._record.store_owner} does not answer"
            self._local_peers.wake()
            with contextlib.suppress(RuntimeError, TimeoutError):
                self._record.set_flag_once(_VERDICT, message)
            return Ending(EXIT_HUNG, message if self._rank <= 1 else None)

    def _is_judge(self) -> bool:
        """Whether this rank is the one that compares all ranks; the first to ask is."""
        assert self._record is not None
        if self._record.set_flag_once(f"{_JUDGE}_{self._num_absent_judges}", str(self._rank)):
            return True
        now = time.monotonic()
        self._judge_seen_at = self._judge_seen_at or now
        if now > self._judge_seen_at + _JUDGING_SECONDS:
            self._num_absent_judges, self._judge_seen_at = self._num_absent_judges + 1, None
        return False

    def _observe_heartbeats(self) -> None:
        """Wait for another heartbeat of all ranks, sending this rank's own meanwhile."""
        assert self._record is not None
        until = time.monotonic() + _OBSERVATION_SECONDS + self._interval
        while time.monotonic() < until:
            time.sleep(self._interval / 2)
            self._sample_position(is_stuck=True)
            self._record.report(self._own)

    def _finish(self, ending: Ending) -> None:
        if ending.code == EXIT_HUNG:
            self._local_peers.wake()
            failure = write_hang_files(
                self._folder, self._rank, with_collectives=self._record is not None
            )
            if ending.message is not None:
                stacks = failure or f"stacks and collectives in {self._folder}: {NAMES}"
                ending = ending._replace(message=f"{ending.message}; {stacks}")
        self._end(ending)


def _end_process(ending: Ending) -> NoReturn:
    if ending.message is not None:
        sys.stderr.write(f"error on rank {os.environ.get('RANK', '0')}: {ending.message}\n")
        sys.stderr.flush()
    if ending.code == EXIT_HUNG:
        time.sleep(_DRAIN_SECONDS)
    # The main thread may be in a collective that never returns: nothing can be unwound.
    os._exit(ending.code)
