"""Spoilt inputs: each is refused in one line that names it, or understood; none crashes, none is
taken for something else. Every change is drawn from a seed that the test prints."""

from __future__ import annotations

import os
import random
import resource
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.distributed import run_ranks
from tests.hostile.surfaces import SURFACES

SEED = int(os.environ.get("MANYFORMER_FUZZ_SEED", "0"))
PER_RUN, PER_SOAK = 216, 20_000  # over all surfaces
SLOWEST = 10.0  # seconds for one input
MOST_MEMORY = 1 << 30  # bytes that all inputs of a surface may add


class Report(NamedTuple):
    """The results of the attempts on one surface."""

    faults: list[str]
    slowest: float
    memory: int


def _fuzz(surface: str, folder: Path, seed: int, attempts: int) -> Report:
    made = SURFACES[surface](folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faults, slowest = [], 0.0
    for number in range(attempts):
        # Each attempt has a seed of its own, so that one can be looked at alone.
        attempt = made.attempt(random.Random(f"{surface} {seed} {number}"))
        begin = time.monotonic()
        fault = attempt.fault()
        slowest = max(slowest, time.monotonic() - begin)
        if fault is not None:
            faults.append(f"attempt {number}, {attempt.what}: {fault}")
    memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return Report(faults, slowest, memory)


def _check(surface: str, folder: Path, attempts: int) -> None:
    # In a process of its own: a library that crashes ends that one.
    [report] = run_ranks(_fuzz, 1, surface, folder, SEED, attempts, init=False, timeout=3000)
    print(
        f"{surface}: {attempts} inputs with seed {SEED}, {len(report.faults)} not as they should "
        f"be, slowest {report.slowest:.2f} s, {report.memory / 2**20:.0f} MiB more"
    )
    assert report.faults == [], "\n".join(report.faults[:20])
    assert report.slowest < SLOWEST
    assert report.memory < MOST_MEMORY


@pytest.mark.parametrize("surface", SURFACES)
def test_spoilt_inputs_are_refused_in_a_line_or_understood(surface: str, tmp_path: Path) -> None:
    _check(surface, tmp_path, PER_RUN // len(SURFACES))


@pytest.mark.slow
@pytest.mark.parametrize("surface", SURFACES)
def test_many_spoilt_inputs_are_refused_or_understood(surface: str, tmp_path: Path) -> None:
    _check(surface, tmp_path, PER_SOAK // len(SURFACES))
