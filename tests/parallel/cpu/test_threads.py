"""Number of compute threads, chosen from resources that are read from files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.cpu.threads import (
    THREADS,
    CpuResources,
    choose,
    count_cores,
    cpu_quota,
    prepare_threads,
)

ROOT = Path(__file__).resolve().parents[3]


def _write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("facts", "threads"),
    [
        (CpuResources(cores=2), None),  # torch's own choice
        (CpuResources(cores=64, quota=64.0), None),
        (CpuResources(cores=64, quota=2.0), "2"),
        (CpuResources(cores=64, quota=2.9), "2"),
        (CpuResources(cores=64, quota=0.5), "1"),
        (CpuResources(cores=2, ranks=2), "1"),
        (CpuResources(cores=2, ranks=4), "1"),
        (CpuResources(cores=64, ranks=8), "8"),
        (CpuResources(cores=64, quota=16.0, ranks=4), "4"),
        (CpuResources(cores=1, ranks=1), None),
    ],
)
def test_threads_are_the_cores_that_the_quota_and_other_ranks_leave(facts, threads):
    choice = choose(facts, {})
    assert choice.variables.get(THREADS) == threads
    assert choice.remark is None


def test_a_number_of_threads_that_is_given_stays():
    assert choose(CpuResources(cores=4, ranks=2), {THREADS: "3"}).variables == {}


@pytest.mark.parametrize(
    ("facts", "threads", "parts"),
    [
        (CpuResources(2), "3", ["OMP_NUM_THREADS=3", "set it to 2"]),
        (CpuResources(2, ranks=2), "2", ["OMP_NUM_THREADS=2", "2 ranks", "set it to 1"]),
        (CpuResources(64, quota=4.0), "64", ["4 cores that they may use", "set it to 4"]),
    ],
)
def test_a_remark_has_the_cause_and_the_remedy_in_one_line(facts, threads, parts):
    remark = choose(facts, {THREADS: threads}).remark
    assert remark is not None
    assert "\n" not in remark
    for part in parts:
        assert part in remark


@pytest.mark.parametrize("threads", ["1", "5", "2,1"])  # the last one is for libgomp to judge
def test_nothing_is_remarked_where_the_threads_have_cores(threads):
    assert choose(CpuResources(8), {THREADS: threads}).remark is None


def test_a_quota_of_version_2_is_the_least_on_the_way_to_the_root(tmp_path):
    _write(tmp_path / "proc/self", cgroup="0::/jobs/mine\n")
    groups = tmp_path / "cgroup"
    _write(groups / "jobs/mine", cpu__max="max 100000\n")
    assert cpu_quota(cgroups=groups, proc=tmp_path / "proc") is None
    _write(groups / "jobs", cpu__max="150000 50000\n")
    assert cpu_quota(cgroups=groups, proc=tmp_path / "proc") == 3.0
    _write(groups / "jobs/mine", cpu__max="50000 100000\n")
    assert cpu_quota(cgroups=groups, proc=tmp_path / "proc") == 0.5


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_a_quota_of_version_1_is_read_in_its_own_hierarchy(mount, tmp_path):
    _write(tmp_path / "proc/self", cgroup="9:memory:/jobs\n4:cpu,cpuacct:/jobs\n0::/\n")
    groups = tmp_path / "cgroup"
    _write(groups / mount / "jobs", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert cpu_quota(cgroups=groups, proc=tmp_path / "proc") is None
    _write(groups / mount / "jobs", cpu__cfs_quota_us="250000\n", cpu__cfs_period_us="100000\n")
    assert cpu_quota(cgroups=groups, proc=tmp_path / "proc") == 2.5


def test_a_container_that_sees_only_its_own_group_finds_its_quota_at_the_root(tmp_path):
    _write(tmp_path / "proc/self", cgroup="0::/../../docker/0123\n3:cpu:/docker/0123\n")
    groups = tmp_path / "cgroup"
    _write(groups, cpu__max="200000 100000\n")
    assert cpu_quota(cgroups=groups, proc=tmp_path / "proc") == 2.0
    _write(groups / "cpu", cpu__cfs_quota_us="100000\n", cpu__cfs_period_us="100000\n")
    assert cpu_quota(cgroups=groups, proc=tmp_path / "proc") == 1.0


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert cpu_quota(cgroups=tmp_path / "cgroup", proc=tmp_path / "proc") is None


def test_threads_of_one_core_count_once(tmp_path):
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        _write(tmp_path / f"cpu{cpu}/topology", thread_siblings_list=f"{siblings}\n")
    assert count_cores({0, 1, 2, 3}, folder=tmp_path) == 2
    assert count_cores({0, 2}, folder=tmp_path) == 1
    assert count_cores({0, 1}, folder=tmp_path) == 2
    assert count_cores({4, 5}, folder=tmp_path) == 2, "nothing is known of them"


def test_torch_takes_the_choice_and_keeps_what_is_given():
    code = (
        "from parallel.cpu.threads import prepare_threads; prepare_threads(ranks=64)\n"
        "import torch; print(torch.get_num_threads())"
    )

    def threads(**given: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k != THREADS}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment | given,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    assert threads() == "1"
    assert threads(OMP_NUM_THREADS="2") == "2"


def test_nothing_is_set_once_torch_is_loaded():
    assert "torch" in sys.modules, "another test has imported it"
    environment: dict[str, str] = {}
    assert prepare_threads(ranks=64, environment=environment) is None
    assert environment == {}
