"""Every job script is one that Slurm takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pretrain.files import CONFIGS
from tests.launchers.cluster import ROOT, Cluster

SCRIPTS = sorted((ROOT / "launchers").glob("*.slurm"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_slurm_finds_nodes_for_every_job_script(cluster: Cluster, script: Path) -> None:
    done = cluster.run("sbatch", "--test-only", script, "training.lr=1e-3")
    nodes = re.search(r"--nodes=(\d+)", script.read_text())
    assert nodes is not None
    processors = 64 * int(nodes[1])
    assert f"using {processors} processors" in done.stderr, "exclusive: all of every node"


def test_slurm_refuses_more_than_the_cluster_has(cluster: Cluster) -> None:
    done = cluster.run("sbatch", "--test-only", "--nodes=17", SCRIPTS[0], check=False)
    assert done.returncode != 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_job_script_is_named_after_the_run_file_it_starts(script: Path) -> None:
    text = script.read_text()
    assert f"#SBATCH --job-name={script.stem}\n" in text
    assert re.search(rf"^run_job {script.stem} ", text, re.MULTILINE)
    assert (CONFIGS / f"{script.stem}.yaml").is_file()
