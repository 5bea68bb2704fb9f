"""The Triton kernel of the recurrence without a GPU: interpreted, and compiled for two of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.ecosystem


def _printed(program: str, *arguments: str, **environment: str) -> str:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", f"tests.models.common.{program}", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 127, 128, 129, 130, 255, 256, 257, 1000])
def test_the_interpreted_kernel_is_the_recurrence_in_every_gradient(length):
    _printed("interpreted_scan", str(length), TRITON_INTERPRET="1")


@pytest.mark.parametrize("capability", ["80", "90"])
def test_the_launches_of_a_step_compile_without_spilling(capability, tmp_path):
    printed = _printed("compiled_scan", capability, TRITON_CACHE_DIR=str(tmp_path))
    programs = json.loads(printed)
    assert len(programs) == 6
    for program in programs:
        assert (program["STACK"], program["LOCAL"]) == (0, 0), program
        assert program["offsets"] == ["i64"], program
    # One for each pass, whatever the length; others for tensors that are not aligned.
    hashes = [program["program"] for program in programs]
    assert hashes[:2] == hashes[2:4]
    assert len(set(hashes)) == 4
