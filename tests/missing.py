"""Programs and packages that a machine may lack, and whether a test is then skipped or fails."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def cannot_run(lacks: str, *, needs: str) -> NoReturn:
    """Skip the test, such as one that `needs` "Slurm" because there is "no sbatch here".

    With REQUIRE_SLURM=1, which says that all packages of `.ci/run` are installed, it fails: a test
    that is left out there would go unseen.
    """
    if os.environ.get("REQUIRE_SLURM") == "1":
        pytest.fail(f"REQUIRE_SLURM=1 and {lacks}")
    pytest.skip(f"needs {needs}: {lacks}")
