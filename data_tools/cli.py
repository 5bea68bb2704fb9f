"""What the command lines share: text inputs, one-line errors, progress."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data_tools.errors import DataError
from data_tools.workers import ReportProgress

_LOG_SECONDS = 60.0  # between lines of progress where stderr is a file


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
        ".parquet; directories and globs of them; hf:NAME[:CONFIG][@SPLIT] of Hugging Face's hub, "
        "or hf:DIRECTORY",
    )
    parser.add_argument(
        "--json-key", default="text", help="key of .jsonl objects, or column, that holds the text"
    )
    parser.add_argument(
        "--on-bad-line",
        choices=("error", "skip"),
        default="error",
        help="what to do with a document that is not UTF-8, too large or not the JSON expected",
    )


@contextmanager
def progress_bar(description: str, total_bytes: int) -> Iterator[ReportProgress]:
    """Documents/s, MB/s and the time left on stderr: a bar on a terminal, else a line a minute."""
    if not sys.stderr.isatty():
        yield _log_progress(description, total_bytes)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[rates]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total_bytes, rates="")

        def report(documents: int, bytes_done: int) -> None:
            elapsed = progress.tasks[task].elapsed or 0.0
            rates = _rates(documents, bytes_done, elapsed) if elapsed > 0 else ""
            progress.update(task, completed=bytes_done, rates=rates)

        yield report


def _log_progress(description: str, total_bytes: int) -> ReportProgress:
    begin = last = time.monotonic()

    def report(documents: int, bytes_done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _LOG_SECONDS or bytes_done == 0:
            return
        last, elapsed = now, now - begin
        left = elapsed * (total_bytes - bytes_done) / bytes_done
        print(
            f"{description}: {bytes_done / total_bytes:.1%}  "
            f"{_rates(documents, bytes_done, elapsed)}  {left / 60:,.0f} min left",
            file=sys.stderr,
            flush=True,
        )

    return report


def _rates(documents: int, num_bytes: int, elapsed: float) -> str:
    return f"{documents / elapsed:,.0f} docs/s  {num_bytes / elapsed / 1e6:.1f} MB/s"


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
