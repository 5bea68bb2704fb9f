"""OpenMP wait policy, active (spin) or passive (sleep), adapted to the load during a run.

libgomp, the OpenMP library of torch's wheels, has a barrier at the end of every operation. A thread
that waits there spins for milliseconds before it sleeps. With one core per thread spinning is
fastest: sleeping and waking at every operation halves the speed of a small model. But when other
work shares the cores, a spinning thread uses up the time slice of the thread that it waits for, and
a step takes several times as long as its share of the cores explains.

`OMP_WAIT_POLICY` is read only once, when libgomp is loaded. But libgomp also stops spinning when it
has more threads than there are CPUs (its manual, GOMP_SPINCOUNT). `WaitPolicy` therefore keeps a
second pool of idle threads while other processes are busy. The number of compute threads, and so
the order of every sum, does not change.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

from parallel.cpu.threads import POLICY, SPIN, ranks_sharing_cpus, usable_cpus

_PROC = Path("/proc")
_CONTENDED, _FREE = 0.5, 0.25  # missing CPUs above which threads sleep, and below which they spin
_MIN_INTERVAL = 0.5  # seconds between measurements; /proc/stat counts hundredths


class CpuTimes(NamedTuple):
    """Seconds: monotonic clock, busy time of the CPUs that this process may use, and CPU time of
    this process."""

    clock: float
    busy: float
    process: float


def cpu_times(*, proc: Path = _PROC) -> CpuTimes | None:
    """Read the CPU times now, to measure the load between two readings; None without /proc."""
    try:
        stat = (proc / "stat").read_text(encoding="ascii")
    except OSError:
        return None
    busy = _busy_seconds(stat, usable_cpus())
    own = os.times()
    return None if busy is None else CpuTimes(time.monotonic(), busy, own.user + own.system)


def _busy_seconds(stat: str, cpus: set[int]) -> float | None:
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

    The ranks of a run do the same work at the same time, so each is assumed to be as busy as this
    one.
    """
    run = (until.process - since.process) * ranks
    return max(0.0, (until.busy - since.busy - run) / (until.clock - since.clock))


class WaitPolicy:
    """The wait policy of this process's threads: active while CPUs are free, otherwise passive.

    `ranks`: processes of the run on these CPUs, with as many `threads` each.
    """

    def __init__(self, library: ctypes.CDLL, *, ranks: int, threads: int) -> None:
        self._library, self._ranks, self._threads = library, ranks, threads
        self._cpus = len(usable_cpus())
        self._since = cpu_times()
        self._pool: _IdlePool | None = None
        self._has_warned = False

    @classmethod
    def of_this_process(cls, *, ranks: int, threads: int) -> WaitPolicy | None:
        """The policy of this process; None with a single thread, if the user has set a policy, if
        the threads are not libgomp's, or if the load cannot be measured."""
        if threads == 1 or SPIN in os.environ or POLICY in os.environ:
            return None
        path = _loaded_libgomp()
        if path is None or cpu_times() is None:
            return None
        return cls(ctypes.CDLL(path), ranks=ranks_sharing_cpus(ranks), threads=threads)

    @property
    def is_passive(self) -> bool:
        return self._pool is not None

    def adapt(self) -> str | None:
        """Measure the load, between two steps, and adapt; returns a warning the first time that
        threads become passive.

        Does nothing within half a second of the last measurement.
        """
        if self._since is None or time.monotonic() - self._since.clock < _MIN_INTERVAL:
            return None
        now = cpu_times()
        if now is None:
            return None
        busy = busy_cores(self._since, now, ranks=self._ranks)
        self._since = now
        missing = self._ranks * self._threads + busy - self._cpus
        if self._pool is None and missing > _CONTENDED:
            # With the compute threads more than there are CPUs; a pool needs at least two threads.
            self._pool = _IdlePool(self._library, max(2, self._cpus - self._threads + 2))
            if not self._has_warned:
                self._has_warned = True
                return self._warning(busy)
        elif self._pool is not None and missing < _FREE:
            self.close()
        return None

    def _warning(self, busy: float) -> str:
        return (
            f"other processes keep {busy:.1f} of {self._cpus} CPUs busy: while they do, "
            f"the {self._threads} threads of a rank sleep instead of spin where they wait for each "
            "other; stop these processes to train at full speed"
        )

    def close(self) -> None:
        """Return to active waiting."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


class _IdlePool:
    """Idle threads that libgomp counts among its own until `close`."""

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        self._parallel, self._num_threads = library.GOMP_parallel, num_threads
        self._parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        self._parallel.restype = None
        self._started, self._stop = threading.Event(), threading.Event()
        self._owner = threading.Thread(target=self._own_pool, name="idle-pool", daemon=True)
        self._owner.start()
        self._started.wait()

    def _own_pool(self) -> None:
        # A pool belongs to the thread that creates it; any function without effect will do.
        no_op = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
        self._parallel(no_op, None, self._num_threads, 0)
        self._started.set()
        self._stop.wait()

    def close(self) -> None:
        self._stop.set()
        self._owner.join()


def _loaded_libgomp(*, proc: Path = _PROC) -> str | None:
    """The path of the libgomp that torch computes with, among those loaded."""
    try:
        maps = (proc / "self/maps").read_text(errors="replace")
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5].strip() for line in maps.splitlines() if "/libgomp" in line}
    return max(paths, key=lambda path: "/torch" in path, default=None)
