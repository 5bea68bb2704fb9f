"""Every defence has a test that fails without it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.faults.mutants import MUTANTS, ROOT, mutated


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_changes_its_source(name: str) -> None:
    mutant = MUTANTS[name]
    assert mutated(mutant, ROOT) != (ROOT / mutant.file).read_text()
    for test in mutant.tests:
        path, _, function = test.partition("::")
        assert f"def {function}(" in (ROOT / path).read_text()


@pytest.mark.slow
def test_no_mutant_survives() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.mutants"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(MUTANTS) >= 12
