"""Helpers of all benchmarks: interleaved timing, medians, tables, and the machine they ran on."""

from __future__ import annotations

import datetime
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch


class Table(NamedTuple):
    """Prints as Markdown, so that a result can be kept as it is."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [self.header, ["---"] + ["---:"] * (len(self.header) - 1), *self.rows]
        return "\n".join([f"{self.title}\n", *(f"| {' | '.join(line)} |" for line in lines)])


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each call, called in turn and in alternating order: A B, B A, A B, ...

    Whatever else the machine does then slows all contestants alike. `clock` is time.process_time
    where others crowd the cores: CPU seconds of this process, which equal time on one quiet core
    with one thread. `before` is called before each, and is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(warmup + rounds):
        order = list(contestants.items())
        for name, call in order if number % 2 == 0 else reversed(order):
            before()
            begin = clock()
            call()
            if number >= warmup:
                seconds[name].append(clock() - begin)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], ours: str, theirs: str) -> str:
    """Speed-up of ours: the median over rounds, and the quartiles around it.

    Both sides of a round saw the same load, so their quotient varies less than either time.
    """
    quotients = [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
    low, middle, high = statistics.quantiles(quotients, n=4)
    return f"{middle:.2f}x ({low:.2f} to {high:.2f})"


def machine() -> str:
    """CPU model, cores, threads, load, versions and date, on one line."""
    device = f"{torch.get_num_threads()} of {os.cpu_count()} cores, {_cpu_model()}"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, {device}"
    return (
        f"{device}, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {datetime.date.today().isoformat()}"
    )


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", path.read_text()) if path.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
