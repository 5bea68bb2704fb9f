"""`make gpu-check`: what has passed is not run again, and what has not is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = sorted(p.name[5:-7] for p in (ROOT / "tests" / "gpu").glob("test_*_gpu.py"))


def _check(folder: Path, *, failing: str = "") -> tuple[int, list[str]]:
    """The exit code of make, and the parts that it has run with an interpreter that is none."""
    log, interpreter = folder / "log", folder / "python"
    log.write_text("")
    fails = f'case "$*" in *_{failing}_*) exit 1;; esac'
    interpreter.write_text(f'#!/bin/sh\necho "$*" >> {log}\n{fails}\n')
    interpreter.chmod(0o755)
    command = ["make", "-s", "gpu-check", f"PYTHON={interpreter}", f"GPU_DONE={folder}/done"]
    code = subprocess.run(command, cwd=ROOT, capture_output=True).returncode
    return code, log.read_text().splitlines()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_part_that_failed_is_the_one_that_is_run_again(tmp_path):
    code, run = _check(tmp_path, failing="run")
    assert code != 0
    assert run == [
        *(f"-m pytest -q tests/gpu/test_{part}_gpu.py" for part in PARTS),
        "-m tests.gpu.benchmark",
    ]
    assert _check(tmp_path, failing="run")[1] == ["-m pytest -q tests/gpu/test_run_gpu.py"]
    assert _check(tmp_path) == (0, ["-m pytest -q tests/gpu/test_run_gpu.py"])
    assert _check(tmp_path) == (0, [])
