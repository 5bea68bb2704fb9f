"""Workers that report their progress: threads, or processes that exit with their parent."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from typing import Any, NamedTuple, TypeVar

from data_tools.errors import DataError
from data_tools.progress import ReportProgress

_Item = TypeVar("_Item")
_TASKS_PER_WORKER = 2  # submitted: one running, one queued
_REPORT_SECONDS = 0.2


class ProgressDelta(NamedTuple):
    """Progress of a task since its last report."""

    documents: int
    num_bytes: int


class _Cancelled(Exception):
    """Raised in a task after another one failed."""


def run_tasks(
    task: Callable[[_Item], Iterator[ProgressDelta]],
    items: Iterable[_Item],
    *,
    num_workers: int,
    report: ReportProgress,
    in_threads: bool = False,
) -> None:
    """Run a task for every item, in the caller or in workers, in no particular order.

    `in_threads`: workers are threads of this process, and not processes.

    Raises:
        DataError: a worker process died.
        Exception: the first one raised by a task; the other tasks are stopped.
    """
    if num_workers == 1:
        _run_here(task, items, report)
        return
    # Spawn, do not fork: threads of the tokenizer libraries do not survive a fork.
    context = get_context("spawn")
    shared = context.Array("q", 3)  # documents, bytes, and whether to stop
    pool: Executor
    if in_threads:
        pool, run = ThreadPoolExecutor(num_workers), partial(_run, shared, task)
    else:
        pool = ProcessPoolExecutor(
            num_workers, mp_context=context, initializer=_prepare_worker, initargs=(shared,)
        )
        run = partial(_run_in_worker, task)
    try:
        _run_pool(pool, run, items, num_workers, lambda: report(shared[0], shared[1]))
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {num_workers} worker processes died, most likely out of memory; pass a "
            "smaller --workers"
        ) from error
    finally:
        shared[2] = 1
        pool.shutdown(cancel_futures=True)


def _run_here(
    task: Callable[[_Item], Iterator[ProgressDelta]], items: Iterable[_Item], report: ReportProgress
) -> None:
    documents = num_bytes = 0
    for item in items:
        for advance in task(item):
            documents += advance.documents
            num_bytes += advance.num_bytes
            report(documents, num_bytes)


def _run_pool(
    pool: Executor,
    run: Callable[[_Item], None],
    items: Iterable[_Item],
    num_workers: int,
    report: Callable[[], None],
) -> None:
    waiting = iter(items)
    pending: set[Future[None]] = set()
    while True:
        free = _TASKS_PER_WORKER * num_workers - len(pending)
        pending |= {pool.submit(run, item) for item in islice(waiting, free)}
        if not pending:
            return
        finished, pending = wait(pending, timeout=_REPORT_SECONDS, return_when=FIRST_COMPLETED)
        for future in finished:
            future.result()
        report()


_shared: Any = None  # in a worker process: the array read by its parent


def _run_in_worker(task: Callable[[_Item], Iterator[ProgressDelta]], item: _Item) -> None:
    _run(_shared, task, item)


def _run(shared: Any, task: Callable[[_Item], Iterator[ProgressDelta]], item: _Item) -> None:
    for advance in task(item):
        with shared.get_lock():
            shared[0] += advance.documents
            shared[1] += advance.num_bytes
            if shared[2]:
                raise _Cancelled


def _prepare_worker(shared: Any) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent reports an interrupt, once
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per CPU is enough
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent does: a killed parent cannot stop its workers, which wait for tasks."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
