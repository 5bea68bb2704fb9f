"""A command line in a forked process, without the seconds that importing torch takes in a new one.

What only a new process shows (what a command imports, reads from its environment or prints while it
starts) is left to tests that start one.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

from tests.distributed import run_ranks

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Finished(NamedTuple):
    """The outcome of a command, under the names of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


def run_forked(module: str, *arguments: object, cwd: Path | None = None) -> Finished:
    """`python -m module arguments`, which nobody launched as a rank."""
    [finished] = run_ranks(_run, 1, module, [*map(str, arguments)], cwd, init=False)
    return finished


def _run(module: str, arguments: list[str], cwd: Path | None) -> Finished:
    for name in _LAUNCHED:
        del os.environ[name]
    if cwd is not None:
        os.chdir(cwd)
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # it is run, as a new process would
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = 0 if end.code is None else end.code
    assert isinstance(code, int), code
    return Finished(code, out.getvalue(), err.getvalue())
