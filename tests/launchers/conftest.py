"""One cluster for all tests of the launchers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.launchers.cluster import Cluster, reason_to_skip
from tests.missing import cannot_run


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """16 nodes of 8 GPUs. REQUIRE_SLURM=1 turns a machine that cannot have them into a failure."""
    reason = reason_to_skip()
    if reason is not None:
        cannot_run(reason, needs="Slurm")
    with Cluster(tmp_path_factory.mktemp("slurm"), num_nodes=16) as running:
        yield running
