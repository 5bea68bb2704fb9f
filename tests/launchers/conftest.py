"""One cluster for all tests of the launchers."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.launchers.cluster import Cluster, reason_to_skip


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """16 nodes of 8 GPUs. REQUIRE_SLURM=1 turns a machine that cannot have them into a failure."""
    reason = reason_to_skip()
    if reason is not None:
        if os.environ.get("REQUIRE_SLURM") == "1":
            pytest.fail(f"REQUIRE_SLURM=1 and {reason}")
        pytest.skip(f"needs Slurm: {reason}")
    with Cluster(tmp_path_factory.mktemp("slurm"), num_nodes=16) as running:
        yield running
