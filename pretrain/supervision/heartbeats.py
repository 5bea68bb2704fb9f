"""Heartbeats of all ranks in the store, and process handles of the ranks on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import NoReturn, TypeVar

import torch.distributed as dist

from pretrain.supervision.flight_recorder import Call
from pretrain.supervision.progress import Progress

STORE_TIMEOUT = 1.5  # seconds until the store counts as hung
_READ_SECONDS = 1 / 256  # more for each rank that is read
_MAX_DISTANCE = 16  # ranks before and after this one that may share its machine
_UNKNOWN = Progress("an unknown host", 0)
T = TypeVar("T")


class RunRecord:
    """Progress of every rank, and flags that are set once, in the store of the rendezvous.

    Every call raises TimeoutError or RuntimeError if the store does not answer.
    """

    def __init__(self, store: dist.Store, *, rank: int, size: int) -> None:
        # A separate connection: the main thread may be blocked in its own.
        self._store = dist.PrefixStore("watchdog", store.clone())  # type: ignore[attr-defined]
        self._rank, self._size = rank, size

    @property
    def store_owner(self) -> str:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return f"torchrun on {os.environ['MASTER_ADDR']}, which keeps the record of all ranks,"
        return "rank 0, which keeps the record of all ranks,"

    def report(self, own: Progress) -> None:
        with_timeout(STORE_TIMEOUT, partial(self._store.set, _key(self._rank), json.dumps(own)))

    def read(self, ranks: range | None = None) -> dict[int, Progress]:
        """Progress of `ranks`, by default of all; a blank for ranks that have not reported."""
        ranks = range(self._size) if ranks is None else ranks
        seconds = STORE_TIMEOUT + _READ_SECONDS * len(ranks)
        return with_timeout(seconds, partial(self._read, ranks))

    def get_flag(self, key: str) -> str | None:
        """The value of a flag; None while it is unset."""
        return with_timeout(STORE_TIMEOUT, lambda: self._get(key))

    def set_flag_once(self, key: str, text: str) -> bool:
        """Set a flag unless another rank has; returns whether this rank set it."""
        first = with_timeout(STORE_TIMEOUT, lambda: self._store.compare_set(key, "", text).decode())
        return first == text

    def _read(self, ranks: range) -> dict[int, Progress]:
        keys = {rank: _key(rank) for rank in ranks}
        if self._store.check(list(keys.values())):
            found = dict(zip(keys, self._store.multi_get(list(keys.values())), strict=True))
        else:
            found = {r: self._store.get(k) for r, k in keys.items() if self._store.check([k])}
        return {r: _parse(found[r]) if r in found else _UNKNOWN for r in ranks}

    def _get(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None


def _parse(text: bytes) -> Progress:
    progress = Progress(*json.loads(text))
    return progress._replace(calls=tuple(Call(*call) for call in progress.calls))


class LocalPeers:
    """The other ranks on this machine, whose exit is noticed immediately (pidfd)."""

    def __init__(self, *, rank: int, size: int) -> None:
        around = range(max(0, rank - _MAX_DISTANCE), min(size, rank + _MAX_DISTANCE + 1))
        self._unattached = {other for other in around if other != rank}
        self._rank, self._around = rank, around
        self._handles: dict[int, int] = {}
        self._known: dict[int, Progress] = {}
        self._exited_early: set[int] = set()  # exited before we attached

    def attach(self, record: RunRecord, own: Progress) -> None:
        """Start watching the ranks that have reported where they run."""
        if not self._unattached or sys.platform != "linux":
            return
        for rank, progress in record.read(self._around).items():
            if rank in self._unattached and progress.pid:
                self._unattached.discard(rank)
                # A pid is valid only in its own host and pid namespace.
                if (progress.host, progress.pid_namespace) == (own.host, own.pid_namespace):
                    self._known[rank] = progress
                    try:
                        self._handles[rank] = os.pidfd_open(progress.pid)
                    except ProcessLookupError:
                        self._exited_early.add(rank)

    def ended(self) -> list[int]:
        """Ranks whose processes have exited, whether or not their launcher has noticed."""
        poll = select.poll()
        ranks = {handle: rank for rank, handle in self._handles.items()}
        for handle in ranks:
            poll.register(handle, select.POLLIN)
        return sorted(self._exited_early.union(ranks[handle] for handle, _ in poll.poll(0)))

    def wake(self) -> None:
        """Send SIGCONT, so that stopped processes see the verdict and write their stacks."""
        for handle in self._handles.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGCONT)

    def describe(self, ended: list[int], record: RunRecord) -> str:
        """A message about ranks that exited without reporting an error."""
        with contextlib.suppress(RuntimeError, TimeoutError):
            self._known.update(record.read(self._around))
        names = ", ".join(f"rank {rank} {self._known[rank].last_known}" for rank in ended)
        memory = max(self._known[rank].memory_gib for rank in ended)
        return (
            f"{names} has ended without an error message: killed by signal 9, likely out of memory "
            f"(it held {memory:.1f} GiB; dmesg says more), or crashed; start again to continue"
        )

    def is_reporter(self, ended: list[int]) -> bool:
        """Whether this rank is the one on its machine to report the exit."""
        return self._rank == min({self._rank, *self._handles} - set(ended))

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles = {}


def with_timeout(seconds: float, action: Callable[[], T]) -> T:
    """Return or raise what `action` does, within `seconds`.

    A store whose owner hangs never answers, so the call runs in a thread that can be abandoned.

    Raises:
        TimeoutError: no answer within `seconds`.
    """
    answers: queue.SimpleQueue[Callable[[], T]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            value = action()
        except RuntimeError as error:
            answers.put(partial(_raise, error))
        else:
            answers.put(lambda: value)

    threading.Thread(target=ask, name="watchdog store", daemon=True).start()
    try:
        return answers.get(timeout=seconds)()
    except queue.Empty:
        raise TimeoutError from None


def _raise(error: RuntimeError) -> NoReturn:
    raise error


def _key(rank: int) -> str:
    return f"rank_{rank}"
