"""The number of compute threads of a process.

torch starts one thread per core, regardless of container limits and of the other ranks of a run.
The number chosen here depends only on what a run and its continuation share (cores, quota, ranks)
and never on the load of the machine, because another number of threads sums in another order. How
threads wait for each other does depend on the load: see parallel/cpu/wait_policy.py.

libgomp reads its environment variables when it is loaded, so call `prepare_threads` before torch is
imported. This module does not import torch.
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
    """The CPU resources available to a process.

    `cores`: physical cores among the CPUs of its affinity mask. `quota`: CPU seconds per second
    granted by its control groups; None without a limit. `ranks`: processes of this run that share
    both.
    """

    cores: int
    quota: float | None = None
    ranks: int = 1

    @property
    def usable(self) -> int:
        return self.cores if self.quota is None else max(1, min(self.cores, int(self.quota)))


class ThreadSettings(NamedTuple):
    """Environment variables to set before libgomp is loaded, and a one-line remark, or None."""

    variables: dict[str, str]
    remark: str | None


def choose(resources: CpuResources, given: Mapping[str, str]) -> ThreadSettings:
    """Choose the number of threads of a process with these resources; keep a `given` number."""
    threads = max(1, resources.usable // resources.ranks)
    if THREADS not in given:
        return ThreadSettings({THREADS: str(threads)} if threads < resources.cores else {}, None)
    wanted = given[THREADS]
    if not wanted.isdecimal() or int(wanted) <= threads:
        return ThreadSettings({}, None)
    return ThreadSettings(
        {},
        f"{THREADS}={wanted} in each of {resources.ranks} ranks here makes more threads than the "
        f"{resources.usable} cores that they may use; set it to {threads}",
    )


def usable_cpus() -> set[int]:
    """The logical CPUs of this process's affinity mask."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def count_cores(cpus: set[int], *, folder: Path = _CPUS) -> int:
    """Count the physical cores behind logical CPUs; a CPU of unknown topology counts as one."""
    siblings = (_read(folder / f"cpu{cpu}/topology/thread_siblings_list") for cpu in sorted(cpus))
    return len({text.strip() or cpu for text, cpu in zip(siblings, sorted(cpus), strict=True)})


def cpu_quota(*, cgroups: Path = _CGROUPS, proc: Path = _PROC) -> float | None:
    """CPU seconds per second granted by this process's control groups: the minimum of all levels.

    cgroup v2 has `QUOTA PERIOD` or `max PERIOD` in cpu.max, v1 two files, with -1 for no limit. In
    a container the path in /proc/self/cgroup may be the host's: paths that do not exist are
    skipped, and the root visible in the container is always read.
    """
    limits = [
        limit
        for folder in _cpu_groups(_read(proc / "self/cgroup"), cgroups)
        for limit in (_limit_v2(folder), _limit_v1(folder))
        if limit is not None
    ]
    return min(limits, default=None)


def _cpu_groups(memberships: str, cgroups: Path) -> Iterator[Path]:
    """The directories of the control groups that limit this process, innermost first."""
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
    """Set the environment variables of `choose` for this process; returns its remark.

    `ranks`: processes of this run on this machine. No effect once torch is imported, or on systems
    other than Linux.
    """
    if "torch" in sys.modules or not sys.platform.startswith("linux"):
        return None
    resources = CpuResources(
        cores=count_cores(usable_cpus()), quota=cpu_quota(), ranks=ranks_sharing_cpus(ranks)
    )
    choice = choose(resources, environment)
    environment.update(choice.variables)
    return choice.remark


def ranks_sharing_cpus(ranks: int) -> int:
    """The number of ranks that share the CPUs of this process: all `ranks` of this machine, or 1 if
    the launcher has bound the process to CPUs of its own, as mpirun does."""
    try:
        return ranks if os.sched_getaffinity(os.getppid()) <= os.sched_getaffinity(0) else 1
    except OSError:
        return ranks
