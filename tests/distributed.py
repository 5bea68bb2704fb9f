"""Run a function on N processes over gloo, quickly.

The parent has already imported torch (and what the test module imports), so ranks are forked
instead of started: a test costs tenths of a second, not the seconds that imports take.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.cpu.compat import prepare_deepspeed

# What a run imports late, most of it DeepSpeed while it builds an engine. If each rank did it, that
# would be a third of the CPU time of a tiny run.
_IMPORTED_BY_RUNS = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "numpy.ma",
)


def free_port() -> int:
    """A TCP port that nobody listens on, below those that the kernel gives to clients.

    One of the kernel's choice may be given to another process's connection before it is used.
    """
    draw = random.Random(os.urandom(8))  # not the global generator: forked tests would agree on it
    while True:
        port = draw.randrange(10_000, 32_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 300.0,
    init: bool = True,
    patience: float = 5.0,
    **kwargs: Any,
) -> list[Any]:
    """Call `fn(*args, **kwargs)` on `world_size` forked ranks and return their results in order.

    Each rank sees RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and an initialised
    gloo process group unless `init=False`. Results travel back pickled. Once a rank has failed the
    others have `patience` seconds to end.

    Raises:
        AssertionError: a rank raised, died or did not finish in `timeout` seconds; the message
            holds the log of every rank.
    """
    # Forking while other threads hold locks can deadlock the child.
    torch.set_num_threads(1)
    if "pretrain.engine.engine" in sys.modules:
        for name in _IMPORTED_BY_RUNS:
            importlib.import_module(name)
        prepare_deepspeed()  # it runs compilers
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        pids = [
            _fork_rank(fn, rank, world_size, port, directory, init, args, kwargs)
            for rank in range(world_size)
        ]
        statuses = _wait(pids, timeout, patience)
        if any(status != 0 for status in statuses):
            raise AssertionError(_report(statuses, directory, timeout))
        return [
            pickle.loads((directory / f"{rank}.result").read_bytes()) for rank in range(world_size)
        ]


def _fork_rank(fn, rank, world_size, port, directory, init, args, kwargs) -> int:  # type: ignore[no-untyped-def]
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        gc.freeze()  # a collection would copy every page that the parent's objects are on
        os.setsid()
        _redirect_output(directory / f"{rank}.log")
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            OMP_NUM_THREADS="1",
        )
        if init:
            dist.init_process_group("gloo", rank=rank, world_size=world_size)
        result = fn(*args, **kwargs)
        (directory / f"{rank}.result").write_bytes(pickle.dumps(result))
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # A forked rank must not run the parent's exit handlers; its log may not be writable.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _redirect_output(path: Path) -> None:
    log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _wait(pids: list[int], timeout: float, patience: float) -> list[int | None]:
    """Exit statuses; None: did not finish."""
    statuses: dict[int, int | None] = {}
    deadline = time.monotonic() + timeout
    while len(statuses) < len(pids) and time.monotonic() < deadline:
        for pid in pids:
            if pid not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
                    if statuses[pid] != 0:
                        deadline = min(deadline, time.monotonic() + patience)
        time.sleep(0.005)
    for pid in pids:
        if pid not in statuses:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return [statuses.get(pid) for pid in pids]


def _report(statuses: list[int | None], directory: Path, timeout: float) -> str:
    lines = []
    for rank, status in enumerate(statuses):
        verdict = (
            f"exit {status}" if status is not None else f"not finished (limit {timeout:.0f} s)"
        )
        log = directory / f"{rank}.log"
        lines.append(
            f"--- rank {rank}: {verdict}\n{log.read_text()[-3000:] if log.exists() else ''}"
        )
    return "\n".join(lines)
