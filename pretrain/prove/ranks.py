"""Forked processes, from one that has torch and DeepSpeed imported.

A forked rank starts in a tenth of a second, an interpreter with these imports in ten.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import random
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

import torch

from parallel.cpu.compat import prepare_deepspeed
from pretrain.errors import EXIT_COMPLETED, EXIT_CRASHED, EXIT_LOST_RANK
from pretrain.prove.errors import RunFailedError

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
# What a run imports late: once here instead of in every rank.
_IMPORTED_BY_RUNS = (
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "numpy.ma",
    "parallel.megatron",
    "parallel.pipeline",
    "pretrain.run",
)


class Ended(NamedTuple):
    """The end of a process: its exit code (negative: a signal; None: killed at the deadline)."""

    code: int | None
    log: Path

    @property
    def last_line(self) -> str:
        lines = [x.strip() for x in self.log.read_text(errors="replace").splitlines() if x.strip()]
        errors = [line for line in lines if re.match("error( on rank|:)", line)]
        return (errors or lines or ["it wrote nothing"])[-1]


class Forks:
    """Forked processes, each a group of its own; those left at the end of the block are killed.

    `patience`: seconds that the others have once one of `wait` has failed. `for_runs`: import here
    what a run imports late.
    """

    def __init__(self, *, patience: float = 10.0, for_runs: bool = True) -> None:
        self._patience = patience
        self._running: dict[int, Path] = {}
        torch.set_num_threads(1)  # forking beside other threads can deadlock the child
        if for_runs:
            for name in _IMPORTED_BY_RUNS:
                importlib.import_module(name)
            prepare_deepspeed()  # it runs compilers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pid in list(self._running):
            self._kill(pid)

    def start(
        self, function: Callable[[], int], log: Path, environment: Mapping[str, str] | None = None
    ) -> int:
        """Fork a process that ends with the code `function()`; returns its id."""
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _run_child(function, log, environment or {}, parent)
        self._running[pid] = log
        return pid

    def wait(self, pids: Sequence[int], *, timeout: float) -> list[Ended]:
        """Wait for processes to end, and kill those that do not within `timeout` seconds."""
        ends: dict[int, Ended] = {}
        deadline = time.monotonic() + timeout
        while len(ends) < len(pids):
            for pid in pids:
                if pid not in ends and (end := self._reap(pid)) is not None:
                    ends[pid] = end
                    if end.code != EXIT_COMPLETED:
                        deadline = min(deadline, time.monotonic() + self._patience)
            if time.monotonic() > deadline:
                break
            time.sleep(0.005)
        for pid in pids:
            if pid not in ends:
                log = self._running[pid]
                self._kill(pid)
                ends[pid] = Ended(None, log)
        return [ends[pid] for pid in pids]

    def call(self, name: str, function: Callable[[], T], place: Path, *, timeout: float) -> T:
        """The result of `function()` in a process of its own; `place` prefixes its files, `name`
        says in an error what failed.

        Raises:
            RunFailedError: it raised, died or did not end in time.
        """
        result = place.with_suffix(".pickle")

        def run() -> int:
            result.write_bytes(pickle.dumps(function()))
            return EXIT_COMPLETED

        (end,) = self.wait([self.start(run, place.with_suffix(".log"))], timeout=timeout)
        if end.code != EXIT_COMPLETED:
            raise RunFailedError(f"{name} failed: {end.last_line}")
        value: T = pickle.loads(result.read_bytes())
        return value

    def _reap(self, pid: int) -> Ended | None:
        done, status = os.waitpid(pid, os.WNOHANG)
        if not done:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what it has started itself
        return Ended(os.waitstatus_to_exitcode(status), self._running.pop(pid))

    def _kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # if it has not become a group yet
        os.waitpid(pid, 0)
        self._running.pop(pid, None)


def run_ranks(
    forks: Forks, main: Callable[[], int], *, size: int, logs: Path, timeout: float
) -> None:
    """Run `main` on `size` ranks to the end.

    Raises:
        RunFailedError: a rank did not end with 0; names the one that failed first.
    """
    ends = forks.wait(start_ranks(forks, main, size=size, logs=logs), timeout=timeout)
    if any(end.code != EXIT_COMPLETED for end in ends):
        raise _failure(ends, timeout=timeout)


def start_ranks(forks: Forks, main: Callable[[], int], *, size: int, logs: Path) -> list[int]:
    """Start `main` on `size` ranks, as a launcher would: RANK, WORLD_SIZE, MASTER_ADDR ...; their
    ids. Each writes to `logs/rank_{r}.log`."""
    logs.mkdir(parents=True, exist_ok=True)
    shared = {
        "WORLD_SIZE": str(size),
        "LOCAL_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    return [
        forks.start(main, logs / f"rank_{r}.log", {**shared, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(size)
    ]


def _failure(ends: Sequence[Ended], *, timeout: float) -> RunFailedError:
    """One line about the rank whose failure the others follow from."""

    def blame(item: tuple[int, Ended]) -> int:
        code = item[1].code
        if code is None or code == EXIT_COMPLETED:
            return 2 + (code == EXIT_COMPLETED)
        return int(code == EXIT_LOST_RANK)

    rank, end = min(enumerate(ends), key=blame)
    if end.code is None:
        how = f"did not end within {timeout:.0f} s"
    elif end.code < 0:
        how = f"was killed by {signal.Signals(-end.code).name}"
    else:
        how = f"failed (exit code {end.code})"
    return RunFailedError(f"rank {rank} {how}: {end.last_line}", end.code)


def _run_child(
    function: Callable[[], int], log: Path, environment: Mapping[str, str], parent: int
) -> None:
    """Run `function` in a forked process and end it; never returns."""
    code = EXIT_CRASHED
    try:
        gc.freeze()  # a collection would copy every page that the parent's objects are on
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(code)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        _redirect_output(log)
        os.environ.update(environment)
        code = function()
    except BaseException:
        traceback.print_exc()
    finally:
        # A forked process must not run its parent's exit handlers.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _redirect_output(path: Path) -> None:
    log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def free_port() -> int:
    """A TCP port that nobody listens on, below those that the kernel gives to clients.

    One of the kernel's choice may be given to another process's connection before it is used.
    """
    draw = random.Random(os.urandom(8))  # not the global generator: forked processes would agree
    while True:
        port = draw.randrange(10_000, 32_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
