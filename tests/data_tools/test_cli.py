from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from data_tools.cli import map_in_order
from data_tools.errors import DataError


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_come_in_order_and_items_are_taken_a_few_ahead(num_workers: int) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for taken in range(1, 1001):
            yield -taken

    with closing(map_in_order(abs, items(), num_workers=num_workers)) as results:
        for number in range(1, 101):
            assert next(results) == number
            assert taken - number < 10
    assert taken < 200


def test_error_in_a_worker_is_raised_here() -> None:
    with pytest.raises(ValueError, match="invalid literal for int"):
        list(map_in_order(int, ["1", "one"], num_workers=2))


def test_worker_that_dies_is_reported_in_one_line() -> None:
    with pytest.raises(DataError, match=r"one of 2 worker processes died, .* smaller --workers"):
        list(map_in_order(os._exit, [1], num_workers=2))


def test_progress_shows_rates_on_a_terminal_and_only_there(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("some text")
    command = [sys.executable, "-m", "data_tools.preprocess", "--tokenizer", "bytes"]
    command += ["--input", str(tmp_path / "in.txt"), "--workers", "1", "--output"]
    quiet = subprocess.run([*command, str(tmp_path / "a")], capture_output=True)
    assert (quiet.returncode, quiet.stderr) == (0, b"")
    ours, theirs = pty.openpty()
    shown = subprocess.run([*command, str(tmp_path / "b")], stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    output = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert shown.returncode == 0
    assert "tokenizing" in output
    assert "docs/s" in output
    assert "100%" in output
