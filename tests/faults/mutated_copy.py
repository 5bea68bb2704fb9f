"""A copy of the project in which mutants are tried, each in a process forked for it.

A process with what is slow to import is forked for every trial, so that it costs what its tests
cost.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

from tests.faults.mutation import Mutant, mutated

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("configs", "data_tools", "launchers", "models", "parallel", "pretrain", "tests")
LIMIT = 90.0  # seconds; a defence without which everything stands still is one, too
SURVIVED, KILLED = 0, 1  # what pytest returns


class Copy(NamedTuple):
    """`tree`: the project; `log`: what the last trial printed."""

    tree: Path
    log: Path


@contextmanager
def mutated_copy() -> Iterator[Copy]:
    """A copy of the project to mutate. What is slow to import is then loaded in this process."""
    _import_what_is_slow()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        copy_packages(PACKAGES, tree)
        shutil.copy(ROOT / "pyproject.toml", tree)
        yield Copy(tree, Path(folder, "log"))


def copy_packages(packages: Sequence[str], tree: Path) -> None:
    """Copy packages of the project with their byte code, but none that is being written."""
    for package in packages:
        unfinished = shutil.ignore_patterns("*.pyc.*")
        shutil.copytree(ROOT / package, tree / package, ignore=unfinished)


@contextmanager
def applied(mutant: Mutant, copy: Copy) -> Iterator[None]:
    """Apply a mutant to the copy while the context lasts."""
    path = mutant.path(copy.tree)
    source = path.read_text()
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):  # trials write none
        compiled.unlink()
    path.write_text(mutated(mutant, copy.tree))
    try:
        yield
    finally:
        path.write_text(source)


def run_tests(copy: Copy, tests: Sequence[str], *, limit: float = LIMIT) -> int:
    """Run tests of the copy up to the first that fails; returns pytest's exit status.

    Minus a signal's number if it ended the run, SIGALRM after `limit` seconds.
    """
    options = ["-q", "-x", "-rf", "--tb=short", f"--basetemp={copy.log.parent / 'tmp'}"]
    return run(copy, lambda: int(pytest.main([*options, *tests])), limit=limit)


def run(copy: Copy, entry: Callable[[], int], *, limit: float = LIMIT) -> int:
    """Call `entry`, which imports from the copy, in a forked process; returns its exit status."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _run_and_exit(copy, entry, limit=limit)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == -signal.SIGALRM:
        _end_group(pid)
    return status


def _run_and_exit(copy: Copy, entry: Callable[[], int], *, limit: float) -> NoReturn:
    status = 2
    try:
        os.setsid()
        signal.setitimer(signal.ITIMER_REAL, limit)  # SIGALRM ends a process that does not see it
        descriptor = os.open(copy.log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        os.chdir(copy.tree)
        sys.path[:] = [str(copy.tree), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
        sys.dont_write_bytecode = True
        status = entry()
    finally:
        os._exit(status)


def _end_group(pid: int) -> None:
    """End what a process that ran out of time has left in its session."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _import_what_is_slow() -> None:
    """Everything but our own packages, which a forked process imports from its own tree."""
    from parallel.cpu.compat import prepare_environment

    prepare_environment()
    warnings.simplefilter("ignore")
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    import parallel.megatron
    import parallel.pipeline  # noqa: F401

    for name in list(sys.modules):
        if name.partition(".")[0] in PACKAGES:
            del sys.modules[name]
