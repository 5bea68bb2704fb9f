from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools import demo_corpus, inspect_corpus, preprocess, train_tokenizer, verify
from data_tools.errors import DataError
from tests.refusals import assert_refused


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


_TEXT = ["--input", "a.txt", "--output", "b"]


@pytest.mark.parametrize(
    ("main", "given", "option", "lowest"),
    [
        (demo_corpus.main, ["--output", "b"], "--vocab-size", 1),
        (inspect_corpus.main, ["corpus"], "--max-documents", 1),
        (inspect_corpus.main, ["corpus"], "--samples", 0),
        (inspect_corpus.main, ["corpus"], "--seed", 0),
        (preprocess.main, [*_TEXT, "--tokenizer", "bytes"], "--workers", 1),
        (train_tokenizer.main, _TEXT, "--vocab-size", 1),
        (train_tokenizer.main, [*_TEXT, "--vocab-size", "300"], "--max-megabytes", 1),
        (verify.main, ["corpus"], "--vocab-size", 1),
    ],
)
def test_numbers_below_the_lowest_are_refused_before_anything_is_read(main, given, option, lowest):
    value = lowest - 1
    with assert_refused(option, value, f"{lowest} or more", "raise", error=DataError):
        main([*given, f"{option}={value}"])
