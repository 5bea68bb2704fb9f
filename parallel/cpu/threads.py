"""How many threads a process computes with.

torch starts a thread for every core, whatever a container or the other ranks of a run leave of
them. The number follows only from what a run and its continuation have in common (cores, quota,
ranks), and never from other work, because sums are taken in another order with another number. How
threads wait for each other follows from other work: parallel/cpu/waiting.py.

libgomp reads its variables when it is loaded: call `prepare_threads` before torch is imported. This
module does not import it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

THREADS, SPIN, POLICY = "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
_CPUS = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc")


class CpuResources(NamedTuple):
    """What a process may compute with.

    `cores`: physical ones among the CPUs that it may run on. `quota`: CPU seconds a second that its
    control groups grant; None without a limit. `ranks`: processes of this run that share both.
    """

    cores: int
    quota: float | None = None
    ranks: int = 1

    @property
    def usable(self) -> int:
        return self.cores if self.quota is None else max(1, min(self.cores, int(self.quota)))


class ThreadSettings(NamedTuple):
    """Variables that are set before libgomp is loaded, and one line for the user, or None."""

    variables: dict[str, str]
    remark: str | None


def choose(facts: CpuResources, given: Mapping[str, str]) -> ThreadSettings:
    """Threads of a process of which `facts` hold. A number that is `given` is not changed."""
    threads = max(1, facts.usable // facts.ranks)
    if THREADS not in given:
        return ThreadSettings({THREADS: str(threads)} if threads < facts.cores else {}, None)
    wanted = given[THREADS]
    if not wanted.isdecimal() or int(wanted) <= threads:
        return ThreadSettings({}, None)
    return ThreadSettings(
        {},
        f"{THREADS}={wanted} in each of {facts.ranks} ranks here makes more threads than the "
        f"{facts.usable} cores that they may use; set it to {threads}",
    )


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
    environment: MutableMapping[str, str] = os.environ,
) -> str | None:
    """Set what `choose` chooses for this process; returns its remark.

    `ranks`: processes of this run on this machine.
    Nothing happens once torch is imported, or on a system other than Linux.
    """
    if "torch" in sys.modules or not sys.platform.startswith("linux"):
        return None
    facts = CpuResources(cores=count_cores(usable_cpus()), quota=cpu_quota(), ranks=sharing(ranks))
    choice = choose(facts, environment)
    environment.update(choice.variables)
    return choice.remark


def sharing(ranks: int) -> int:
    """Of the `ranks` on this machine those that share the CPUs of this process: all, or one if its
    launcher has bound it to some of them, as mpirun does."""
    try:
        return ranks if os.sched_getaffinity(os.getppid()) <= os.sched_getaffinity(0) else 1
    except OSError:
        return ranks
