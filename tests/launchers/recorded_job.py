"""Run a job script with the recorder in the place of the interpreter, and read what it wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.launchers.cluster import ROOT, Cluster

RECORDER = Path(__file__).with_name("recorder.py")
OUTPUT = "slurm-%j.out"


class RecordedJob(NamedTuple):
    """`nodes`: what torchrun was called with on each node, sorted by its rank."""

    fields: dict[str, str]
    output: str
    nodes: list[dict[str, Any]]
    log_dir: Path


def run_recorded(
    cluster: Cluster,
    script: str,
    *arguments: str,
    run_dir: Path,
    options: tuple[str, ...] = (),
    variables: Mapping[str, str] | None = None,
) -> RecordedJob:
    """`sbatch OPTIONS launchers/SCRIPT.slurm run_dir=RUN_DIR ARGUMENTS`, to its end."""
    job = cluster.submit(
        *(f"--output={cluster.directory}/{OUTPUT}", *options, ROOT / f"launchers/{script}.slurm"),
        *(f"run_dir={run_dir}", *arguments),
        variables={"PYTHON": str(RECORDER), **(variables or {})},
    )
    fields = cluster.wait(job)
    log_dir = run_dir / "logs" / f"job_{job}" / "launch_0"
    recorded = [json.loads(path.read_text()) for path in log_dir.glob("recorded-*.json")]
    recorded.sort(key=lambda each: int(each["environment"]["SLURM_PROCID"]))
    return RecordedJob(fields, cluster.output(job), recorded, log_dir)


def trainer_arguments(recorded: Mapping[str, Any]) -> list[str]:
    """The arguments after `-m pretrain.train` in those of torchrun."""
    argv = recorded["argv"]
    return argv[argv.index("pretrain.train") + 1 :]


def torchrun_option(recorded: Mapping[str, Any], name: str) -> str:
    [value] = [word.partition("=")[2] for word in recorded["argv"] if word.startswith(f"{name}=")]
    return value
