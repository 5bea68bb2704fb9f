"""Run the project's command lines in this process, and judge their refusals."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple
from unittest import mock

from data_tools.cli import run_command

LONGEST_LINE = 600  # characters, of which a temporary path may be a third


class Outcome(NamedTuple):
    """The output of a command and its exit code; `crash` is the traceback that it ended with."""

    code: int
    out: str
    err: str
    crash: str = ""


def call(main: Callable[[], int | None]) -> Outcome:
    """Run a command with its output caught, as its process would have ended."""
    out, err = io.StringIO(), io.StringIO()
    code, crash = 1, ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main() or 0
        except SystemExit as stopped:  # argparse, after its usage
            code = stopped.code if isinstance(stopped.code, int) else 1
        except BaseException:  # also what Rust raises when it panics
            crash = traceback.format_exc()
    return Outcome(code, out.getvalue(), err.getvalue(), crash)


def train(*argv: str) -> Outcome:
    """`pretrain/train.py`; a run that would begin is not begun here."""
    from pretrain import train as module

    return call(partial(module.main, list(argv)))


def data_tool(module: str, *argv: str) -> Outcome:
    """`python -m data_tools.MODULE`."""
    main = __import__(f"data_tools.{module}", fromlist=["main"]).main
    with mock.patch.object(sys, "argv", [module, *argv]):
        return call(lambda: run_command(main))


def tool(module: str, *argv: str) -> Outcome:
    """`python -m MODULE` of the other packages."""
    main = __import__(module, fromlist=["main"]).main
    return call(partial(main, list(argv)))


def fault_of_refusal(
    outcome: Outcome, names: Sequence[str] = (), *, alone: bool = True
) -> str | None:
    """Why an outcome is not a good refusal; None when it is one.

    Exit code 2 and one line that says `error:` and one of `names`: the file, key or value. `alone`:
    it is all that stands on standard error; a run that began may have said more before.
    """
    if outcome.crash or "Traceback" in outcome.err:
        return f"a traceback: {(outcome.crash or outcome.err)[-1500:]}"
    if outcome.code != 2:
        return f"exit code {outcome.code}: {outcome.out[-300:]}{outcome.err[-300:]}"
    lines = [line for line in outcome.err.splitlines() if re.match(r"error( on rank \d+)?: ", line)]
    if len(lines) != 1 or (alone and outcome.err.rstrip("\n") != lines[0]):
        return f"not one line: {outcome.err[:800]!r}"
    if len(lines[0]) > LONGEST_LINE:
        return f"{len(lines[0])} characters: {lines[0][:300]!r}"
    if names and not any(name in lines[0] for name in names):
        return f"names none of {names}: {lines[0]!r}"
    return None
