"""The cluster of these tests leaves nothing behind, and its absence is reported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.launchers import cluster as cluster_module
from tests.launchers import conftest
from tests.launchers.cluster import Cluster, reason_to_skip, wait_until


def _processes_of(directory: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if entry.name != str(os.getpid()) and str(directory) in command:
            found.append(command)
    return found


def _fail_while_a_job_runs(second: Cluster) -> None:
    waiting = f"tail -f {second.config}"
    second.submit("--nodes=2", "--output=/dev/null", f"--wrap=srun {waiting}")
    wait_until(lambda: sum(waiting in each for each in _processes_of(second.directory)) >= 2, 30)
    raise KeyError("a failing test")


def test_nothing_of_a_cluster_survives_a_test_that_fails(cluster: Cluster, tmp_path: Path) -> None:
    assert cluster.nodes, "one more beside it"
    second = Cluster(tmp_path, num_nodes=2)
    with pytest.raises(KeyError, match="failing"), second:
        _fail_while_a_job_runs(second)
    wait_until(lambda: not _processes_of(tmp_path), 10)
    assert second.bridge not in os.listdir("/sys/class/net")


def test_what_a_machine_lacks_is_named_and_fails_where_slurm_is_required(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(cluster_module, "PROGRAMS", ("sh", "slurmctld-of-nobody"))
    assert reason_to_skip() == "no slurmctld-of-nobody here"
    fixture = conftest.cluster.__wrapped__  # type: ignore[attr-defined]
    monkeypatch.setenv("REQUIRE_SLURM", "1")
    with pytest.raises(pytest.fail.Exception, match=r"REQUIRE_SLURM=1 .*slurmctld-of-nobody"):
        next(fixture(tmp_path_factory))
    monkeypatch.delenv("REQUIRE_SLURM")
    with pytest.raises(pytest.skip.Exception, match="needs Slurm: no slurmctld-of-nobody"):
        next(fixture(tmp_path_factory))
