from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path


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
