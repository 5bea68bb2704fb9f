"""Wait policy of threads, chosen from the load of other processes; results do not change."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from parallel.cpu import wait_policy
from parallel.cpu.threads import POLICY, SPIN, THREADS
from parallel.cpu.wait_policy import CpuTimes, WaitPolicy, busy_cores, cpu_times

ROOT = Path(__file__).resolve().parents[3]


def _stat(*cpus: tuple[int, int]) -> str:
    """/proc/stat with (user, idle) ticks of each CPU."""
    rows = [f"cpu{n} {user} 0 0 {idle} 5 0 0 0 0 0" for n, (user, idle) in enumerate(cpus)]
    return "\n".join(["cpu 99999 0 0 99999 0 0 0 0 0 0", *rows, "intr 1 2 3\n"])


def test_work_is_that_of_the_cpus_this_process_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(wait_policy, "usable_cpus", lambda: {0, 2})
    (tmp_path / "stat").write_text(_stat((100, 900), (5000, 10), (300, 700)))
    times = cpu_times(proc=tmp_path)
    assert times is not None
    assert times.busy == pytest.approx(400 / os.sysconf("SC_CLK_TCK"))
    assert cpu_times(proc=tmp_path / "nothing") is None


def test_busy_cores_are_those_of_others_and_not_of_the_ranks_of_the_run():
    since = CpuTimes(10.0, busy=100.0, process=1.0)
    until = CpuTimes(12.0, busy=104.0, process=2.0)
    assert busy_cores(since, until, ranks=1) == pytest.approx(1.5)
    assert busy_cores(since, until, ranks=2) == pytest.approx(1.0)
    assert busy_cores(since, until, ranks=8) == 0.0


class _Neighbours:
    """A machine of `cpus` whose clock goes on by a second at every look."""

    def __init__(self, monkeypatch, cpus: int, threads: int) -> None:
        self.busy, self._threads = 0.0, threads
        self._times = CpuTimes(0.0, 0.0, 0.0)
        monkeypatch.setattr(wait_policy, "usable_cpus", lambda: set(range(cpus)))
        monkeypatch.setattr(wait_policy, "cpu_times", self._look)
        monkeypatch.setattr(wait_policy.time, "monotonic", lambda: self._times.clock + 1)
        for name in (SPIN, POLICY):
            monkeypatch.delenv(name, raising=False)

    def _look(self) -> CpuTimes:
        clock, busy, process = self._times
        self._times = CpuTimes(
            clock + 1, busy + self._threads + self.busy, process + float(self._threads)
        )
        return self._times


def _has_more_threads(before: int, number: int) -> bool:
    """Threads that are told to end do so soon."""
    for _ in range(500):
        if len(list(Path("/proc/self/task").iterdir())) - before == number:
            return True
        time.sleep(0.01)
    return False


def test_threads_sleep_as_long_as_others_are_busy_and_one_line_says_so(monkeypatch):
    machine = _Neighbours(monkeypatch, cpus=4, threads=3)
    own = WaitPolicy.of_this_process(ranks=1, threads=3)
    assert own is not None
    before = len(list(Path("/proc/self/task").iterdir()))
    remarks = []
    course = {0.0: "spin", 1.4: "spin", 2.0: "sleep", 1.3: "sleep", 0.9: "spin", 3.0: "sleep"}
    for machine.busy, does in course.items():
        remarks.append(own.adapt())
        assert own.is_passive == (does == "sleep"), machine.busy
        # 3 threads of 3 make one more than 4 CPUs with those that compute, one of them Python's.
        assert _has_more_threads(before, 3 if own.is_passive else 0)
    own.close()
    assert _has_more_threads(before, 0)
    [remark] = [remark for remark in remarks if remark is not None]
    assert "keep 2.0 of 4 CPUs busy" in remark
    assert "\n" not in remark


def test_ranks_that_fill_the_cpus_are_no_neighbours(monkeypatch):
    machine = _Neighbours(monkeypatch, cpus=4, threads=2)
    machine.busy = 2.0  # the other rank, which does as this one does
    monkeypatch.setattr(wait_policy, "ranks_sharing_cpus", lambda ranks: ranks)
    own = WaitPolicy.of_this_process(ranks=2, threads=2)
    assert own is not None
    own.adapt()
    assert not own.is_passive
    machine.busy = 3.0
    own.adapt()
    assert own.is_passive
    own.close()
    assert not own.is_passive


def test_nothing_is_changed_within_half_a_second(monkeypatch):
    machine = _Neighbours(monkeypatch, cpus=2, threads=2)
    machine.busy = 2.0
    own = WaitPolicy.of_this_process(ranks=1, threads=2)
    assert own is not None
    clock = own._since.clock
    monkeypatch.setattr(wait_policy.time, "monotonic", lambda: clock + 0.4)
    assert own.adapt() is None
    assert not own.is_passive
    monkeypatch.setattr(wait_policy.time, "monotonic", lambda: clock + 0.6)
    assert own.adapt() is not None
    assert own.is_passive
    own.close()


@pytest.mark.parametrize("given", [{SPIN: "7"}, {POLICY: "ACTIVE"}])
def test_a_policy_that_is_given_stays(given, monkeypatch):
    _Neighbours(monkeypatch, cpus=2, threads=2)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert WaitPolicy.of_this_process(ranks=1, threads=2) is None


def test_one_thread_has_nobody_to_wait_for(monkeypatch):
    _Neighbours(monkeypatch, cpus=2, threads=1)
    assert WaitPolicy.of_this_process(ranks=1, threads=1) is None


def test_sums_are_the_same_whether_threads_sleep_or_spin():
    code = (
        "import torch\n"
        "from parallel.cpu import wait_policy\n"
        "x = torch.randn(300, 700, generator=torch.Generator().manual_seed(0))\n"
        "def sums(): return torch.cat([(x @ x.T).flatten(), x.sum(0), x.exp().sum(1)])\n"
        "first = sums()\n"
        "own = wait_policy.WaitPolicy.of_this_process(ranks=1, threads=torch.get_num_threads())\n"
        "own._cpus, own._since = 1, own._since._replace(clock=0.0)\n"
        "own.adapt(); assert own.is_passive\n"
        "assert torch.equal(first, sums())\n"
        "own.close(); assert torch.equal(first, sums())\n"
    )
    given = {k: v for k, v in os.environ.items() if k not in (SPIN, POLICY)} | {THREADS: "2"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=given, check=True)
