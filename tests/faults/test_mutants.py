"""Every defence has a test that fails without it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from tests.faults.mutants import MUTANTS
from tests.faults.mutated_copy import ROOT
from tests.faults.mutation import Mutant, mutated


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_changes_its_source(name: str) -> None:
    mutant = MUTANTS[name]
    before = ast.parse(mutant.path(ROOT).read_text())
    assert ast.dump(ast.parse(mutated(mutant, ROOT))) != ast.dump(before)
    for test in mutant.tests:
        path, _, function = test.partition("::")
        assert f"def {function}(" in (ROOT / path).read_text()


SOURCE = """
class Store:
    def save(self, files):
        if ( files  and
             self.ready ):  # a comment
            self.write( files )
        else:
            self.skip()
        self.skip()
        return len(files)
"""


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        (
            "if files and self.ready: ...",
            "if False: ...",
            "if False:\n            self.write(files)",
        ),
        ("self.write(files)", "", "            pass\n        else:\n            self.skip()"),
        ("len(files)", "0", "return 0"),
        ("self.skip(); return len(files)", "return 1", "skip()\n        return 1"),
        ("self.write(files)", "a = 1; b(a)", "            a = 1\n            b(a)\n        else"),
    ],
)
def test_a_piece_is_found_however_it_is_formatted(old, new, changed, tmp_path) -> None:
    (tmp_path / "store.py").write_text(SOURCE)
    assert changed in mutated(Mutant("store:Store.save", old, new, ()), tmp_path)


@pytest.mark.parametrize(
    ("place", "old", "message"),
    [
        ("store:Store.save", "self.skip()", r"store:Store.save .* 2 "),
        ("store:Store.save", "self.skip(1)", r"store:Store.save .* 0 "),
        ("store:Store.load", "x", r"store:Store.load.* 0 .*'load'"),
    ],
)
def test_a_piece_that_is_not_there_once_is_refused(place, old, message, tmp_path) -> None:
    (tmp_path / "store.py").write_text(SOURCE)
    with pytest.raises(ValueError, match=message):
        mutated(Mutant(place, old, "None", ()), tmp_path)


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
