"""A rank that dies under Slurm ends its step and is named; the job script suggests a cause."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launchers.cluster import ROOT, Cluster, wait_until
from tests.pretrain.tiny_run import write_endless_run

JOB = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1
cd {root}
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
srun --kill-on-bad-exit=1 {python} pretrain/train.py --config-name tiny --config-dir {configs} \\
  run_dir={run}
code=$?
echo "srun ended with code $code"
exit $code
"""


def _ranks(run_dir: Path) -> dict[int, int]:
    """Rank -> process of the ranks that run, on whichever node: this machine sees all of them."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes()
            match = re.search(rb"SLURM_PROCID=(\d+)", variables)
            is_rank = f"run_dir={run_dir}".encode() in words and not words[0].endswith(b"srun")
            if is_rank and match is not None:
                found[int(match[1])] = int(entry.name)
    return found


@pytest.mark.slow
def test_a_rank_that_is_killed_under_srun_ends_the_step_and_is_named(
    cluster: Cluster, tmp_path: Path
) -> None:
    write_endless_run(tmp_path)
    run_dir = tmp_path / "run"
    script = tmp_path / "job"
    script.write_text(JOB.format(root=ROOT, python=sys.executable, configs=tmp_path, run=run_dir))
    job = cluster.submit(f"--output={tmp_path}/output", script)
    metrics = run_dir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count('"loss"') > 3, 120)
    time.sleep(1.5)
    os.kill(_ranks(run_dir)[1], signal.SIGKILL)
    began = time.monotonic()
    wait_until(lambda: not _ranks(run_dir), 10)
    print(f"srun: all ranks gone {time.monotonic() - began:.1f} s after the kill of one")
    fields = cluster.wait(job)
    output = cluster.output(job)
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "137:0"), output
    assert "srun ended with code 137" in output
    assert len(re.findall(r"error: rank 1 \(process .* does not answer", output)) == 1, output


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("0", "0"),
        ("6", "6"),
        ("137", "137: signal 9, likely out of memory (sacct -j 7 --format=State,MaxRSS says more)"),
        ("143", "143: signal 15"),
    ],
)
def test_the_job_script_says_what_a_code_means(code: str, text: str) -> None:
    job = ROOT / "launchers/lib/job.sh"
    command = f"SLURM_JOB_ID=7; eval \"$(sed -n '/^explain()/,/^}}/p' {job})\"; explain {code}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip() == text
