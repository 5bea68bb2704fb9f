"""Spin or sleep: how the threads of libgomp wait, adapted to the load while a run goes on.

libgomp, the OpenMP library of torch's wheels, has a barrier at the end of every operation. A thread
that waits there spins for milliseconds before it sleeps. With one core per thread spinning is
fastest: sleeping and waking at every operation halves the speed of a small model. But when other
work shares the cores, a spinning thread uses up the time slice needed by the thread that it waits
for, and a step takes several times its share.

`OMP_WAIT_POLICY` is read once, before later load is known. But libgomp also stops spinning whenever
it has more threads than there are CPUs (its manual, GOMP_SPINCOUNT). `WaitPolicy` therefore keeps a
second pool of sleeping threads as long as other processes are busy. The number of compute threads
does not change, and with it neither does the order of any sum.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

from parallel.cpu.threads import POLICY, SPIN, sharing, usable_cpus

_PROC = Path("/proc")
_CONTENDED, _FREE = 0.5, 0.25  # missing CPUs: threshold to start sleeping, and to keep sleeping
_WINDOW = 0.5  # seconds; /proc/stat counts hundredths


class CpuTimes(NamedTuple):
    """Seconds since boot: wall clock, busy time of the CPUs that this process may use, and CPU time
    of this process."""

    clock: float
    work: float
    own: float


def cpu_times(*, proc: Path = _PROC) -> CpuTimes | None:
    """Read the CPU times now, to measure the load between two readings; None without /proc."""
    try:
        stat = (proc / "stat").read_text(encoding="ascii")
    except OSError:
        return None
    work = _work(stat, usable_cpus())
    own = os.times()
    return None if work is None else CpuTimes(time.monotonic(), work, own.user + own.system)


def _work(stat: str, cpus: set[int]) -> float | None:
    """Busy seconds of the given CPUs, from the text of /proc/stat."""
    total, found = 0, False
    for line in stat.splitlines():
        name, *ticks = line.split()
        if name[:3] == "cpu" and name[3:].isdecimal() and int(name[3:]) in cpus:
            user, nice, system, _idle, _iowait, irq, softirq = map(int, ticks[:7])
            total, found = total + user + nice + system + irq + softirq, True
    return total / os.sysconf("SC_CLK_TCK") if found else None


def busy_cores(since: CpuTimes, until: CpuTimes, *, ranks: int) -> float:
    """Number of cores kept busy by other processes between two readings.

    The ranks of a run do the same work at the same time, so each is taken to be as busy as this
    one.
    """
    own = (until.own - since.own) * ranks
    return max(0.0, (until.work - since.work - own) / (until.clock - since.clock))


class WaitPolicy:
    """The wait policy of this process's threads: spin while the CPUs are free, otherwise sleep.

    `ranks`: processes of the run on these CPUs, with as many `threads` each.
    """

    def __init__(self, library: ctypes.CDLL, *, ranks: int, threads: int) -> None:
        self._library, self._ranks, self._threads = library, ranks, threads
        self._cpus = len(usable_cpus())
        self._since = cpu_times()
        self._pool: _SleepingPool | None = None
        self._said = False

    @classmethod
    def of_this_process(cls, *, ranks: int, threads: int) -> WaitPolicy | None:
        """The policy of this process; None with a single thread, if the user has set a policy, if
        the threads are not libgomp's, or if the load cannot be measured."""
        if threads == 1 or SPIN in os.environ or POLICY in os.environ:
            return None
        path = _loaded_libgomp()
        if path is None or cpu_times() is None:
            return None
        return cls(ctypes.CDLL(path), ranks=sharing(ranks), threads=threads)

    @property
    def sleeps(self) -> bool:
        return self._pool is not None

    def adapt(self) -> str | None:
        """Measure the load, between two steps, and adapt; returns a remark when first contended.

        Does nothing within half a second of the last measurement.
        """
        if self._since is None or time.monotonic() - self._since.clock < _WINDOW:
            return None
        now = cpu_times()
        if now is None:
            return None
        busy = busy_cores(self._since, now, ranks=self._ranks)
        self._since = now
        lacking = self._ranks * self._threads + busy - self._cpus
        if self._pool is None and lacking > _CONTENDED:
            # Together with the compute threads more than CPUs; a pool needs at least two threads.
            self._pool = _SleepingPool(self._library, max(2, self._cpus - self._threads + 2))
            if not self._said:
                self._said = True
                return self._remark(busy)
        elif self._pool is not None and lacking < _FREE:
            self.close()
        return None

    def _remark(self, busy: float) -> str:
        return (
            f"other processes keep {busy:.1f} of {self._cpus} CPUs busy: while they do, "
            f"the {self._threads} threads of a rank sleep instead of spin where they wait for each "
            "other; stop these processes to train at full speed"
        )

    def close(self) -> None:
        """Spin again."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


class _SleepingPool:
    """Idle threads that libgomp counts among its own until `close`."""

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        self._parallel, self._num_threads = library.GOMP_parallel, num_threads
        self._parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        self._parallel.restype = None
        self._began, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold, name="sleeping-pool", daemon=True)
        self._thread.start()
        self._began.wait()

    def _hold(self) -> None:
        # A pool belongs to the thread that creates it; any function without effect will do.
        nothing = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
        self._parallel(nothing, None, self._num_threads, 0)
        self._began.set()
        self._end.wait()

    def close(self) -> None:
        self._end.set()
        self._thread.join()


def _loaded_libgomp(*, proc: Path = _PROC) -> str | None:
    """The path of the libgomp that torch computes with, among those loaded."""
    try:
        maps = (proc / "self/maps").read_text(errors="replace")
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5].strip() for line in maps.splitlines() if "/libgomp" in line}
    return max(paths, key=lambda path: "/torch" in path, default=None)
