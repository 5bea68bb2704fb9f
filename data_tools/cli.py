"""What the command lines share: text inputs, one-line errors, a progress bar, worker processes."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data_tools.errors import DataError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_BATCHES_PER_WORKER = 4  # in flight: enough to keep workers busy, few enough to bound memory

ReportProgress = Callable[[int, int], None]
"""Takes documents done and bytes of the input files done."""


def run_command(main: Callable[[Sequence[str]], None]) -> int:
    """Run a command line; its exit status is 2, with one line on stderr, for a user's error."""
    try:
        main(sys.argv[1:])
    except (DataError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: no output was written", file=sys.stderr)
        return 130
    return 0


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Where text comes from: what every command that reads documents takes."""
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=".jsonl (one object a line) or .txt (one document a file), plain, .gz or .zst; "
        "directories and globs of them",
    )
    parser.add_argument("--json-key", default="text", help="key of the text in .jsonl objects")
    parser.add_argument(
        "--on-bad-line",
        choices=("error", "skip"),
        default="error",
        help="what to do with a document that is not UTF-8 or not the JSON expected",
    )


@contextmanager
def progress_bar(description: str, total_bytes: int) -> Iterator[ReportProgress]:
    """A bar with documents/s, MB/s and the time left on stderr, when that is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[rates]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(description, total=total_bytes, rates="")

        def report(documents: int, bytes_done: int) -> None:
            elapsed = progress.tasks[task].elapsed or 0.0
            rates = ""
            if elapsed > 0:
                rates = f"{documents / elapsed:,.0f} docs/s  {bytes_done / elapsed / 1e6:.1f} MB/s"
            progress.update(task, completed=bytes_done, rates=rates)

        yield report


def map_in_order(
    function: Callable[[_Item], _Result], items: Iterable[_Item], *, num_workers: int
) -> Generator[_Result]:
    """`map` over worker processes: results in order, and only a few items ahead of them.

    Raises:
        DataError: a worker process died.
    """
    if num_workers == 1:
        yield from map(function, items)
        return
    # Spawned, not forked: tokenizer libraries hold threads that do not survive a fork.
    pool = ProcessPoolExecutor(
        num_workers, mp_context=get_context("spawn"), initializer=_prepare_worker
    )
    pending: deque[Future[_Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= _BATCHES_PER_WORKER * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {num_workers} worker processes died, most likely out of memory; pass a "
            "smaller --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent reports an interrupt, once
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per CPU is enough
