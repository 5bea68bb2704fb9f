"""Seconds that a rank's device works in forward and backward passes, without waits for other ranks.

On CUDA collectives return at once, and the hosts of all ranks wait alike for the slowest device. So
events are recorded on the stream where a pass begins and ends, and around whatever the stream does
for a collective: sends, receives, and waiting for the others. They are read in a later step, once
the device has reached them, and are never waited for. On a CPU the host's clock takes the place of
events.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

_TIMED_PASSES = 4  # of each kind and step: events cost a few microseconds of the host each
_MAX_STEPS = 4  # whose marks the device has not reached: with more, a step is not timed
# Methods that all functions of torch.distributed call, ours, DeepSpeed's and Megatron-Core's alike
# (torch 2.13). What is not listed counts as work of the device.
_COLLECTIVES = (
    "allreduce",
    "allgather",
    "_allgather_base",
    "reduce_scatter",
    "_reduce_scatter_base",
    "alltoall",
    "alltoall_base",
    "broadcast",
    "reduce",
    "send",
    "recv",
)


class Clock(Protocol):
    """Marks in the work of a device. A mark is reached when the device has done what is before."""

    def mark(self) -> Any:
        """Put a mark behind all work that the calling thread has given to the device."""

    def queue(self) -> object:
        """The queue of work that the next mark is put into."""

    def is_reached(self, mark: Any) -> bool:
        """Whether the device has reached a mark; does not wait for it."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Seconds between two marks that are reached; makes them reusable."""


class HostClock:
    """The clock of a device that works while the host waits for it."""

    def mark(self) -> float:
        return time.perf_counter()

    def queue(self) -> object:
        return None

    def is_reached(self, mark: float) -> bool:
        return True

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class CudaClock:
    """Events of the current CUDA stream, which are used again once they have been read."""

    def __init__(self) -> None:
        self._unused: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        event = self._unused.pop() if self._unused else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def queue(self) -> object:
        return torch.cuda.current_stream().cuda_stream

    def is_reached(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        self._unused += begin, end
        return begin.elapsed_time(end) / 1e3


class CountedPasses(NamedTuple):
    """Passes of a step that wait for other ranks in marked collectives alone.

    `last_backward`: whether the last backward pass of a step, at whose end gradients are reduced,
    is one of them.
    """

    forward: bool = True
    backward: bool = True
    last_backward: bool = True

    def __bool__(self) -> bool:
        return self.forward or self.backward


class _Span(NamedTuple):
    phase: str
    begin: Any
    end: Any


class _Step:
    """Marks of one step: passes, and waits for other ranks within them."""

    def __init__(self, num_micro_batches: int) -> None:
        self.num_micro_batches = num_micro_batches
        self.num_begun = {"forward": 0, "backward": 0}
        self.passes: list[_Span] = []
        self.waits: list[_Span] = []


class PassTimer:
    """Times passes of one rank's steps.

    Entered around each phase of a step, by its name (`Engine.time_passes`), and around the step
    itself by `step`. The first few passes of a step stand for all of it.
    """

    def __init__(self, clock: Clock, counted: CountedPasses) -> None:
        self._clock, self._counted = clock, counted
        self._step: _Step | None = None
        self._unread: deque[_Step] = deque()
        self._phase: str | None = None  # that is being timed, and its queue
        self._queue: object = None
        self._waiting = False
        self._thread = threading.get_ident()

    @contextmanager
    def reported_step(
        self, num_micro_batches: int, report: Callable[[list[float]], None]
    ) -> Iterator[None]:
        """A `step`; reports the seconds of those that can be read after it."""
        with self.step(num_micro_batches):
            yield
        report(self.read())

    @contextmanager
    def step(self, num_micro_batches: int) -> Iterator[None]:
        """A step of so many passes of each kind."""
        if len(self._unread) >= _MAX_STEPS:
            yield
            return
        self._step, self._thread = _Step(num_micro_batches), threading.get_ident()
        try:
            with _around_collectives(self._wait):
                yield
            self._unread.append(self._step)
        finally:
            self._step = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        step = self._step
        if step is None or not self._is_timed(step, phase):
            yield
            return
        begin, self._phase, self._queue = self._clock.mark(), phase, self._clock.queue()
        try:
            yield
        finally:
            self._phase = None
        step.passes.append(_Span(phase, begin, self._clock.mark()))

    def read(self) -> list[float]:
        """Seconds per step of the steps whose marks the device has reached since the last call."""
        found = []
        while self._unread and self._is_reached(self._unread[0]):
            seconds = self._seconds(self._unread.popleft())
            if seconds is not None:
                found.append(seconds)
        return found

    def _is_timed(self, step: _Step, phase: str) -> bool:
        if phase not in step.num_begun:
            return False
        number = step.num_begun[phase] = step.num_begun[phase] + 1
        if number > _TIMED_PASSES:
            return False
        if phase == "forward":
            return self._counted.forward
        is_last = number == step.num_micro_batches
        return self._counted.backward and (self._counted.last_backward or not is_last)

    @contextmanager
    def _wait(self) -> Iterator[None]:
        """Around a collective: what the queue of the pass does in it is no work of its own."""
        step, phase = self._step, self._phase
        if step is None or phase is None or self._waiting or not self._is_of_step():
            yield
            return
        begin, self._waiting = self._clock.mark(), True
        try:
            yield
        finally:
            self._waiting = False
        step.waits.append(_Span(phase, begin, self._clock.mark()))

    def _is_of_step(self) -> bool:
        """Whether the calling thread does the pass's work: this one, or one of autograd's.

        A save in the background has a thread of Python's, and what overlaps with a pass a stream of
        its own.
        """
        is_autograd = isinstance(threading.current_thread(), threading._DummyThread)
        if threading.get_ident() != self._thread and not is_autograd:
            return False
        return self._clock.queue() == self._queue

    def _is_reached(self, step: _Step) -> bool:
        # All marks are in one queue, the last one behind the others.
        return not step.passes or self._clock.is_reached(step.passes[-1].end)

    def _seconds(self, step: _Step) -> float | None:
        """Mean seconds of the timed passes of each kind, times the number of passes."""
        total = 0.0
        own = dict.fromkeys(step.num_begun, 0.0)
        for spans, sign in ((step.passes, 1), (step.waits, -1)):
            for phase, begin, end in spans:
                own[phase] += sign * self._clock.seconds(begin, end)
        for phase, seconds in own.items():
            timed = sum(each.phase == phase for each in step.passes)
            total += seconds / max(timed, 1) * step.num_micro_batches
        return total if step.passes else None


def pass_timer(device: torch.device, counted: CountedPasses) -> PassTimer:
    """The timer of a rank that computes on `device`."""
    return PassTimer(CudaClock() if device.type == "cuda" else HostClock(), counted)


@contextmanager
def _around_collectives(wait: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Enter `wait()` around every collective, and every wait for one, of any library.

    torch has no hook for that, and ranks wait for each other in collectives of Megatron-Core and
    DeepSpeed, too. Those of a compiled graph call none of these methods and are not seen.
    """
    with contextlib.ExitStack() as stack:
        for owner, names in ((dist.ProcessGroup, _COLLECTIVES), (dist.Work, ("wait",))):
            for name in names:
                usual = owner.__dict__[name]
                stack.callback(setattr, owner, name, usual)
                setattr(owner, name, _within(wait, getattr(owner, name)))
        yield


def _within(wait: Callable[[], AbstractContextManager[None]], run: Any) -> Any:
    @functools.wraps(run)
    def within(*args: Any, **kwargs: Any) -> Any:
        with wait():
            return run(*args, **kwargs)

    return within
