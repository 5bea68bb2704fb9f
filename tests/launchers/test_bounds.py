"""Limits of requeueing: how often a job is requeued, and when it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launchers.cluster import ROOT, Cluster, wait_until

TRAINER = """#!/bin/bash
# Stands in for the interpreter of a job; what it does as torchrun follows.
if [[ $2 != torch.distributed.run ]]; then
  for word in "$@"; do [[ $word != run_dir=* ]] || echo "${word#run_dir=}"; done
  exit
fi
"""


def submit(cluster: Cluster, directory: Path, behaviour: str, *options: str) -> str:
    """A job of one node whose ranks behave as the shell text says."""
    trainer = directory / "trainer"
    trainer.write_text(TRAINER + behaviour)
    trainer.chmod(0o755)
    return cluster.submit(
        *(*options, f"--output={cluster.directory}/slurm-%j.out"),
        *(ROOT / "launchers/llama_125m.slurm", f"run_dir={directory}/run"),
        variables={"PYTHON": str(trainer), "MAX_STALLED_LAUNCHES": "1"},
    )


def test_a_job_that_brings_no_checkpoint_gives_up(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "echo launched >> $RUN_DIR/launches; exit 1\n")
    fields = cluster.wait(job, ("FAILED", "COMPLETED"), timeout=600)
    output = cluster.output(job)
    assert (fields["ExitCode"], fields["Restarts"]) == ("93:0", "1"), output
    assert "launches in a row without a checkpoint after step 0: 1" in output
    assert (tmp_path / "run/launches").read_text().split() == ["launched"]


@pytest.mark.slow
def test_a_job_that_gets_on_comes_back_for_as_long_as_it_does(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = submit(
        cluster,
        tmp_path,
        "mkdir -p $RUN_DIR/checkpoints/step_$(((LAUNCH + 1) * 10))\n"
        '(( LAUNCH < 3 )) || touch "$RUN_DIR/DONE"\nexit 1\n',
    )
    fields = cluster.wait(job, timeout=600)
    output = cluster.output(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "3"), output
    assert "failed after step 30; requeueing" in output


# bash cannot trap a signal that was ignored when it started; Python, as a rank, can.
WAITS = """exec python3 - << 'END'
import os, pathlib, signal, sys

run_dir = pathlib.Path(os.environ["RUN_DIR"])

def save(number, frame):
    with open(run_dir / "signals", "a") as file:
        print("asked", file=file)
    (run_dir / "REQUEUE").touch()
    sys.exit()

signal.signal(signal.SIGUSR1, save)
signal.signal(signal.SIGTERM, save)
(run_dir / "started").touch()
while True:
    signal.pause()
END
"""


@pytest.mark.parametrize("way", ["STOP", "scancel"])
def test_a_user_who_ends_a_run_lets_it_save_and_it_stays_away(
    way: str, cluster: Cluster, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path, WAITS)
    wait_until((tmp_path / "run/started").exists, 60)
    if way == "STOP":
        (tmp_path / "run/STOP").touch()
    else:
        cluster.run("scancel", job)
    fields = cluster.wait(job)
    wait_until(lambda: "COMPLETING" not in cluster.run("squeue", "-h", "-j", job).stdout, 60)
    assert fields["Restarts"] == "0", cluster.output(job)
    assert cluster.job(job)["JobState"] == ("FAILED" if way == "STOP" else "CANCELLED")
    assert (tmp_path / "run/signals").read_text().startswith("asked")


@pytest.mark.slow
def test_slurm_itself_sends_the_signal_when_the_time_limit_is_near(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The script asks for it five minutes before the end; of a job of two minutes that is now."""
    job = submit(cluster, tmp_path, WAITS, "--time=2")
    try:
        wait_until(lambda: cluster.job(job)["Restarts"] == "1", 110)
        assert "the end of the time limit is near" in cluster.output(job)
    finally:
        cluster.run("scancel", job)
    assert (tmp_path / "run/REQUEUE").exists()


@pytest.mark.slow
def test_the_signal_before_the_time_limit_reaches_ranks_that_were_not_yet_listening(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Until they set their handlers the signal is ignored, and it is said again."""
    job = submit(cluster, tmp_path, f'touch "$RUN_DIR/early"\nsleep 7\n{WAITS}')
    wait_until((tmp_path / "run/early").exists, 60)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    try:
        wait_until(lambda: cluster.job(job)["Restarts"] == "1", 60)
    finally:
        cluster.run("scancel", job)
    assert (tmp_path / "run/signals").read_text().split() == ["asked"]
