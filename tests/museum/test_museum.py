"""Bugs of other stacks, re-created here, are caught."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.distributed import run_ranks
from tests.faults.mutated_copy import ROOT
from tests.faults.mutation import mutated
from tests.museum.exhibits import EXHIBITS
from tests.museum.guide import known, table, written_table
from tests.museum.trial import try_exhibits

# They need the same run, which is proven once without them.
_SHOWN = ("norms and biases decay", "moments begin again at zero")


@pytest.mark.parametrize("name", EXHIBITS)
def test_an_exhibit_fits_the_code(name: str) -> None:
    mutant = EXHIBITS[name].mutant
    before = ast.parse(mutant.path(ROOT).read_text())
    assert ast.dump(ast.parse(mutated(mutant, ROOT))) != ast.dump(before)
    for test in mutant.tests:
        path, _, function = test.partition("::")
        assert (ROOT / path).exists()
        if function:
            assert f"def {function.partition('[')[0]}(" in (ROOT / path).read_text()


def test_an_exhibit_has_a_source_of_its_own() -> None:
    sources = [exhibit.source for exhibit in EXHIBITS.values()]
    assert len({(source.project, source.number) for source in sources}) == len(EXHIBITS) >= 30
    for source in sources:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", source.project)
        assert source.number > 0
        assert source.what


def test_the_table_is_that_of_the_results_and_has_a_row_for_every_exhibit() -> None:
    assert list(known()) == list(EXHIBITS)
    assert written_table() == table(known())


def test_exhibits_are_caught_by_a_proof() -> None:
    """In a process forked from this one, which has imported what is slow to import."""
    [caught] = run_ranks(_caught, 1, _SHOWN, init=False, timeout=900)
    assert caught == [*_SHOWN]


def _caught(names: Sequence[str]) -> list[str]:
    return [name for name, verdict in try_exhibits(names, quick=True) if verdict.is_caught]


@pytest.mark.slow
def test_every_exhibit_is_caught() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.museum"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=3 * 3600,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
