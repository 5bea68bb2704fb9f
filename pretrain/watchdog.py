"""Ends a run that no longer moves, and says which rank holds it up.

A collective waits for its last rank, for half an hour or for ever. Here every rank has a thread
that tells the others how far its main thread has come, over a store of their own. The first thread
whose main thread has not come on for `timeout` seconds compares how far every rank is and gives a
verdict. All ranks then write their stacks into the run directory, say the verdict in one line and
end, so that the launcher ends the job and a scheduler can start it again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

import torch.distributed as dist

from pretrain.errors import EXIT_HUNG, one_line
from pretrain.ranks import Ranks

_ANSWER = 2.0  # seconds in which the store answers, unless its keeper is what stands still
_OBSERVATION = 1.5  # seconds that ranks are watched to see whether they live
_FAREWELL = 2.0  # seconds that the keeper of the store outlives the verdict
_VERDICT = "verdict"
T = TypeVar("T")


class Progress(NamedTuple):
    """How far a rank has come: `beats` counts what its thread has sent, `moves` what its main
    thread has done, of which the last was `activity`."""

    host: str
    pid: int
    beats: int = 0
    moves: int = 0
    activity: str = "starting"


class Watchdog:
    """Watches the main thread of one rank; a context manager. Collective to make.

    `moved` is called by the main thread whenever it has come on; it costs no communication.
    `end` gets the verdict; by default it ends the process with EXIT_HUNG. `timeout` None: watch
    nothing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        ranks: Ranks,
        timeout: float | None,
        end: Callable[[str], object] | None = None,
    ) -> None:
        self._folder, self._ranks, self._timeout = folder, ranks, timeout
        self._end = end or _end_process
        self._interval = min(1.0, (timeout or 1.0) / 5)
        self._own = Progress(socket.gethostname(), os.getpid())
        self._moved_at = time.monotonic()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._store = None if timeout is None else _shared_store(ranks)

    def __enter__(self) -> Watchdog:
        if self._timeout is not None:
            self.moved("starting")
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def moved(self, activity: str) -> None:
        """The main thread has come on and begins `activity`, such as "step 12"."""
        self._own = self._own._replace(moves=self._own.moves + 1, activity=activity)
        self._moved_at = time.monotonic()

    def _watch(self) -> None:
        assert self._timeout is not None
        beats, verdict = 0, None
        while verdict is None:
            beats += 1
            with contextlib.suppress(RuntimeError, TimeoutError):  # told below, when it matters
                verdict = _within(_ANSWER, partial(self._report, beats))
            waited = time.monotonic() - self._moved_at
            if verdict is None and waited > self._timeout:
                verdict = self._judge(waited, beats)
            if verdict is None and self._closing.wait(self._interval):
                return
        self._finish(verdict)

    def _report(self, beats: int) -> str | None:
        """Tell how far this rank is; returns the verdict when there is one."""
        if self._store is None:
            return None
        self._store.set(_key(self._ranks.rank), json.dumps(self._own._replace(beats=beats)))
        return self._store.get(_VERDICT).decode() if self._store.check([_VERDICT]) else None

    def _judge(self, waited: float, beats: int) -> str:
        """What this rank finds, or what another one has found before it."""
        what = f"no progress in {self._own.activity} for {waited:.0f} s"
        limit = f"(watchdog.timeout is {self._timeout:g})"
        if self._store is None:
            return f"{what} {limit}: there is no other rank"
        try:
            before = _within(_ANSWER, self._read_all)
            time.sleep(_OBSERVATION + self._interval)
            _within(_ANSWER, partial(self._report, beats + 1))
            after = _within(_ANSWER, self._read_all)
            culprit = blame(before, after, own_rank=self._ranks.rank)
            verdict = f"{what} {limit}: {culprit}"
            return _within(_ANSWER, partial(self._agree, verdict))
        except (RuntimeError, TimeoutError):
            return f"{what} {limit}: rank 0, which keeps the record of all ranks, does not answer"

    def _agree(self, verdict: str) -> str:
        assert self._store is not None
        return self._store.compare_set(_VERDICT, "", verdict).decode()

    def _read_all(self) -> dict[int, Progress]:
        assert self._store is not None
        store, everyone = self._store, range(self._ranks.size)
        known = [rank for rank in everyone if store.check([_key(rank)])]
        found = {rank: Progress(*json.loads(store.get(_key(rank)))) for rank in known}
        return {rank: found.get(rank, Progress("an unknown host", 0)) for rank in everyone}

    def _finish(self, verdict: str) -> None:
        path = self._folder / f"stacks_rank_{self._ranks.rank:05d}.txt"
        try:
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            verdict += f"; the stacks could not be written: {one_line(error)}"
        if self._ranks.is_first and self._store is not None:
            time.sleep(_FAREWELL)
        self._end(f"{verdict}; stacks in {self._folder}/stacks_rank_*.txt")


def blame(before: Mapping[int, Progress], after: Mapping[int, Progress], *, own_rank: int) -> str:
    """Name the ranks that hold the others up, from two looks at all of them."""
    silent = [
        rank
        for rank, progress in after.items()
        if rank != own_rank and progress.beats == before[rank].beats
    ]
    if silent:
        return ", ".join(f"{_named(rank, after[rank])} does not answer" for rank in silent)
    least = min(progress.moves for progress in after.values())
    behind = [rank for rank, progress in after.items() if progress.moves == least]
    if len(behind) == len(after):
        return "all ranks have come equally far, and their stacks say what each waits for"
    return ", ".join(f"{_named(rank, after[rank])} has come least far" for rank in behind)


def _named(rank: int, progress: Progress) -> str:
    return f"rank {rank} (process {progress.pid} on {progress.host}, in {progress.activity})"


def _within(seconds: float, action: Callable[[], T]) -> T:
    """What `action` returns or raises. A store whose keeper stands still never answers, so that it
    is asked from a thread that may be left behind.

    Raises:
        TimeoutError: nothing came in `seconds`.
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


def _shared_store(ranks: Ranks) -> dist.TCPStore | None:
    """A store that rank 0 keeps; None for one process."""
    if ranks.size == 1:
        return None
    kept = _open_store(0, is_master=True) if ranks.is_first else None
    port = ranks.broadcast(None if kept is None else kept.port)
    return kept or _open_store(port, is_master=False)


def _open_store(port: int, *, is_master: bool) -> dist.TCPStore:
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        port,
        is_master=is_master,
        timeout=timedelta(seconds=_ANSWER),
        wait_for_workers=False,
    )


def _end_process(message: str) -> NoReturn:
    sys.stderr.write(f"error on rank {os.environ.get('RANK', '0')}: {message}\n")
    sys.stderr.flush()
    # The main thread may be in a collective that never ends, so nothing can be unwound.
    os._exit(EXIT_HUNG)
