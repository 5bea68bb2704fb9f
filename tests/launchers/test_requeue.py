"""A tiny model trained by real jobs on two nodes: stopped, queued again, continued to the bit."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from pretrain.config import RunConfig, to_yaml
from pretrain.errors import EXIT_COMPLETED
from tests.distributed import run_ranks
from tests.launchers.cluster import ROOT, Cluster, wait_until
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import tiny_run, write_data

STEPS = 100


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the run file `tiny` and its corpus."""
    directory = tmp_path_factory.mktemp("requeue")
    write_data(directory)
    (directory / "tiny.yaml").write_text(to_yaml(_run(directory)))
    return directory


def _run(directory: Path, **changes: object) -> RunConfig:
    settings = {
        "training__max_steps": STEPS,
        "training__batch_size": 2,
        "checkpoint__interval": 1000,
        "evaluation__interval": 1000,
    }
    return tiny_run(directory, **settings, **changes)


def submit(
    cluster: Cluster,
    configs: Path,
    run_dir: Path,
    *options: str,
    arguments: tuple[str, ...] = (),
    variables: Mapping[str, str] | None = None,
) -> str:
    """A job of two nodes with a rank each."""
    return cluster.submit(
        *("--nodes=2", f"--output={cluster.directory}/slurm-%j.out"),
        *(*options, ROOT / "launchers/llama_125m.slurm"),
        *("--config-name", "tiny", "--config-dir", configs, f"run_dir={run_dir}", *arguments),
        variables={
            "PYTHON": sys.executable,
            "RANKS_PER_NODE": "1",
            "OMP_NUM_THREADS": "1",
            **(variables or {}),
        },
    )


def losses(run_dir: Path) -> dict[int, float]:
    """Step -> loss of all launches together; a step that was trained twice must agree."""
    found: dict[int, float] = {}
    path = run_dir / "metrics.jsonl"
    # The last piece is empty, or a line that is just being written.
    for line in path.read_text().split("\n")[:-1] if path.exists() else []:
        record = json.loads(line)
        if "loss" in record:
            assert found.setdefault(record["step"], record["loss"]) == record["loss"]
    return found


@pytest.fixture(scope="module")
def undisturbed(configs: Path) -> dict[int, float]:
    """The losses of a run of two ranks that nothing happens to, without a job around it."""
    config = _run(configs, run_dir=str(configs / "undisturbed"))
    assert run_ranks(run_training, 2, config, init=False) == [EXIT_COMPLETED] * 2
    found = losses(Path(config.run_dir))
    assert sorted(found) == list(range(1, STEPS + 1))
    return found


def test_a_signal_saves_and_queues_the_job_again_and_the_losses_are_those_of_an_undisturbed_run(
    cluster: Cluster, configs: Path, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, configs, run_dir)
    wait_until(lambda: len(losses(run_dir)) >= 3, 300)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: cluster.job(job)["Restarts"] == "1", 300)
    [stopped] = [int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*")]
    assert 3 <= stopped < STEPS
    assert (run_dir / "REQUEUE").exists()
    fields = cluster.wait(job, timeout=240)
    output = cluster.output(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), output
    assert f"saved step {stopped} and stopped as requested; requeueing" in output
    assert f"continuing after step {stopped}" in output
    assert losses(run_dir) == undisturbed
    for launch in (0, 1):
        examined = run_dir / "logs" / f"job_{job}" / f"launch_{launch}" / "doctor.txt"
        assert "all 2 tasks see each other's files" in examined.read_text()
    assert (run_dir / "DONE").exists()
    assert not (run_dir / "REQUEUE").exists()


@pytest.mark.slow
def test_a_node_that_dies_is_replaced_and_the_run_goes_on_from_its_last_checkpoint(
    cluster: Cluster, configs: Path, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, configs, run_dir, arguments=("checkpoint.interval=10",))
    wait_until(lambda: len(losses(run_dir)) >= 15, 120)
    killed = cluster.hosts(job)[1]
    cluster.kill_node(killed)
    try:
        wait_until(lambda: cluster.job(job)["Restarts"] == "1", 300)
        fields = cluster.wait(job, timeout=240)
        output = cluster.output(job)
        assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), output
        assert killed not in cluster.hosts(job)
        [resumed] = re.findall(r"continuing after step (\d+)", output)
        assert int(resumed) >= 10
        assert losses(run_dir) == undisturbed
    finally:
        cluster.start_node(killed)
        cluster.wait_for_nodes(killed)


@pytest.mark.slow
def test_a_job_that_is_preempted_saves_in_its_grace_time_and_loses_nothing(
    cluster: Cluster, configs: Path, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, configs, run_dir)
    wait_until(lambda: len(losses(run_dir)) >= 5, 120)
    urgent = cluster.submit(
        *("--partition=urgent", f"--nodelist={cluster.hosts(job)[0]}", "--exclusive"),
        *("--output=/dev/null", "--wrap=true"),
    )
    assert cluster.wait(urgent, timeout=600)["JobState"] == "COMPLETED"
    fields = cluster.wait(job, timeout=240)
    output = cluster.output(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), output
    [saved] = re.findall(r"stopped at step (\d+) as requested", output)
    assert f"continuing after step {saved}" in output
    assert losses(run_dir) == undisturbed
