"""Progress reports of the command lines on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

ReportProgress = Callable[[int, int], None]
"""Called with the documents and the input bytes processed so far."""

_LOG_SECONDS = 60.0  # between progress lines when stderr is not a terminal


@contextmanager
def progress_bar(description: str, total_bytes: int) -> Iterator[ReportProgress]:
    """Show documents/s, MB/s and time left on stderr: a bar on a terminal, else a line a minute."""
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
