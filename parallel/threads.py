"""How many threads a process computes with, and how long they spin before they sleep.

torch starts a thread for every core, whatever a container or the other ranks of a run leave of
them. The threads of libgomp, the OpenMP library of torch's wheels, meet at the end of every
operation, and one that waits spins for milliseconds before it sleeps. With a core for each thread
that is the fastest way to wait. When other work shares the cores, a spinning thread uses up the
time slice that the thread it waits for needs, and a step takes many times its share. Threads that
sleep at once share well, but waking them for every operation costs more than a tenth of a step on a
quiet machine.

`SPIN_COUNT` is meant to lie between: longer than the gaps between the operations of a step, and
short beside the time slices of a scheduler. It needs no knowledge of neighbours, so it serves for
those that come later, too. Its value is an estimate: tests/benchmarks/shared_cores.py measures it
and has not been run on a quiet machine. The number of threads follows only from what a run and its
continuation have in common (cores, quota, ranks), because sums are taken in another order with
another number.

libgomp reads its variables when it is loaded: call `prepare_threads` before torch is imported. This
module does not import it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

THREADS, SPIN, POLICY = "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
SPIN_COUNT = 10_000  # an estimate, not measured yet; libgomp's own is 300,000
_CPUS = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
_CONTENDED = 0.5  # cores that are wanted beyond those that are free, for a remark


class Facts(NamedTuple):
    """What a process may compute with.

    `cores`: physical ones among the CPUs that it may run on. `quota`: CPU seconds a second that its
    control groups grant; None without a limit. `ranks`: processes of this run that share both.
    `busy`: how many of the cores other work has kept busy.
    """

    cores: int
    quota: float | None = None
    ranks: int = 1
    busy: float = 0.0

    @property
    def usable(self) -> int:
        return self.cores if self.quota is None else max(1, min(self.cores, int(self.quota)))


class Choice(NamedTuple):
    """Variables that are set before libgomp is loaded, and one line for the user, or None."""

    variables: dict[str, str]
    remark: str | None


def choose(facts: Facts, given: Mapping[str, str]) -> Choice:
    """Threads and waiting for a process of which `facts` hold. What is `given` is not changed."""
    threads = max(1, facts.usable // facts.ranks)
    variables = {}
    if THREADS not in given and threads < facts.cores:
        variables[THREADS] = str(threads)
    if SPIN not in given and POLICY not in given:
        variables[SPIN] = str(SPIN_COUNT)
    return Choice(variables, _remark(facts, threads, given.get(THREADS, str(threads))))


def _remark(facts: Facts, fitting: int, threads: str) -> str | None:
    wanted = int(threads) if threads.isdecimal() else fitting
    if wanted > fitting:
        return (
            f"{THREADS}={threads} in each of {facts.ranks} ranks here makes more threads than the "
            f"{facts.usable} cores that they may use; set it to {fitting}"
        )
    free = max(0.0, facts.usable - facts.busy)
    if facts.ranks * wanted - free > _CONTENDED and wanted > 1:
        fewer = max(1, int(free) // facts.ranks)
        return (
            f"other processes keep {facts.busy:.1f} of {facts.cores} cores busy: {wanted} threads "
            f"will wait for them and each other; stop them, or set {THREADS}={fewer}"
        )
    return None


class CpuTimes(NamedTuple):
    """Seconds since the start of the machine: of the clock, of work on the CPUs that this process
    may use, and of work of this process."""

    clock: float
    work: float
    own: float


def cpu_times(*, proc: Path = _PROC) -> CpuTimes | None:
    """A moment from which to measure how busy the machine is; None without /proc."""
    work = _work(_read(proc / "stat"), usable_cpus())
    own = os.times()
    return None if work is None else CpuTimes(time.monotonic(), work, own.user + own.system)


def _work(stat: str, cpus: set[int]) -> float | None:
    """Seconds that some CPUs have worked, by /proc/stat."""
    total, found = 0, False
    for line in stat.splitlines():
        name, *ticks = line.split()
        if name[:3] == "cpu" and name[3:].isdecimal() and int(name[3:]) in cpus:
            user, nice, system, _idle, _iowait, irq, softirq = map(int, ticks[:7])
            total, found = total + user + nice + system + irq + softirq, True
    return total / os.sysconf("SC_CLK_TCK") if found else None


def busy_cores(since: CpuTimes | None, until: CpuTimes | None, *, ranks: int) -> float:
    """Cores that others have kept busy between two moments.

    The ranks of a run start together and do the same, so each of them counts as this one.
    """
    if since is None or until is None or until.clock <= since.clock:
        return 0.0
    own = (until.own - since.own) * ranks
    return max(0.0, (until.work - since.work - own) / (until.clock - since.clock))


def usable_cpus() -> set[int]:
    """The logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def count_cores(cpus: set[int], *, folder: Path = _CPUS) -> int:
    """Physical cores behind logical CPUs; a CPU of which nothing is known counts as one."""
    siblings = (_read(folder / f"cpu{cpu}/topology/thread_siblings_list") for cpu in sorted(cpus))
    return len({text.strip() or cpu for text, cpu in zip(siblings, sorted(cpus), strict=True)})


def cpu_quota(*, cgroups: Path = _CGROUPS, proc: Path = _PROC) -> float | None:
    """CPU seconds a second that the control groups of this process grant, the least of all levels.

    Version 2 writes `QUOTA PERIOD` or `max PERIOD` to cpu.max, version 1 two files, with -1 for no
    limit. In a container the path of /proc/self/cgroup may be that of the host: what is not there
    is passed over, and the root that the container sees is always looked at.
    """
    limits = [
        limit
        for folder in _cpu_groups(_read(proc / "self/cgroup"), cgroups)
        for limit in (_limit_v2(folder), _limit_v1(folder))
        if limit is not None
    ]
    return min(limits, default=None)


def _cpu_groups(memberships: str, cgroups: Path) -> Iterator[Path]:
    """The folders of the groups that limit this process, innermost first."""
    for line in memberships.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        roots = [cgroups / controllers, cgroups / "cpu"] if controllers else [cgroups]
        root = next((each for each in roots if each.is_dir()), cgroups)
        inner = root / path.strip("/")
        yield inner
        while inner != root and root in inner.parents:
            inner = inner.parent
            yield inner


def _limit_v2(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdecimal() else None


def _limit_v1(folder: Path) -> float | None:
    quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def prepare_threads(
    *,
    ranks: int = 1,
    since: CpuTimes | None = None,
    environment: MutableMapping[str, str] = os.environ,
) -> str | None:
    """Set what `choose` chooses for this process; returns its remark.

    `ranks`: processes of this run on this machine. `since`: an earlier moment, of `cpu_times`.
    Nothing happens once torch is imported, or on a system other than Linux.
    """
    if "torch" in sys.modules or not sys.platform.startswith("linux"):
        return None
    ranks = ranks if _shares_cpus() else 1
    facts = Facts(
        cores=count_cores(usable_cpus()),
        quota=cpu_quota(),
        ranks=ranks,
        busy=busy_cores(since, cpu_times(), ranks=ranks),
    )
    choice = choose(facts, environment)
    environment.update(choice.variables)
    return choice.remark


def _shares_cpus() -> bool:
    """Whether a launcher has left this process all CPUs, not some of its own as mpirun does."""
    try:
        return os.sched_getaffinity(os.getppid()) <= os.sched_getaffinity(0)
    except OSError:
        return True
