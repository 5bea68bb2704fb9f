"""Findings of the doctor on the nodes of a job, before any rank starts."""

from __future__ import annotations

from pathlib import Path

from tests.launchers.cluster import Cluster
from tests.launchers.test_requeue import configs, submit

__all__ = ["configs"]  # the fixture


def test_a_job_whose_data_are_missing_ends_at_once_with_the_remedy(
    cluster: Cluster, configs: Path, tmp_path: Path
) -> None:
    job = submit(cluster, configs, tmp_path / "run", arguments=("data.train=/no/corpus",))
    fields = cluster.wait(job, timeout=240)
    output = cluster.output(job)
    assert (fields["ExitCode"], fields["Restarts"]) == ("2:0", "0"), output
    assert "error    data.train source corpus: no /no/corpus.bin and no /no/corpus.idx" in output
    assert "-> make it with python -m data_tools.preprocess" in output
    assert "all 2 tasks see each other's files" in output
    assert "training on" not in output
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["logs"]
