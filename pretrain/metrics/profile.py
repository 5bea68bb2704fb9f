"""Profiles of chosen steps: a Chrome trace and a summary of every rank, and CUDA's memory.

Per range of steps a folder RUN_DIR/profile/steps_10_12 with `rank_N.json.gz` (chrome://tracing or
ui.perfetto.dev), `rank_N.txt` and, with logging.memory_snapshot, `rank_N.memory.pickle`
(pytorch.org/memory_viz). A file that cannot be written is reported and never stops a run.
"""

from __future__ import annotations

import gzip
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from parallel.cpu.compat import device_type
from pretrain.config import LoggingConfig
from pretrain.engine.engine import Engine
from pretrain.errors import ConfigError

_NUM_OPERATORS = 20
# The last key of a trace, whose value is a path, and the bytes from it to the end at most.
_TRACE_END, _TRACE_END_BYTES = b'"traceName"', 5000
logger = logging.getLogger(__name__)


def check_profile(config: LoggingConfig) -> None:
    """Refuse a memory snapshot where there is no CUDA device.

    Raises:
        ConfigError: it is asked for.
    """
    if config.memory_snapshot and device_type() != "cuda":
        raise ConfigError(
            "logging.memory_snapshot=true needs a CUDA device, of which alone torch records the "
            "memory, and this machine has none; remove it"
        )


class Phases:
    """Names the phases of a step in the trace, and measures them.

    On CUDA a phase is the time that the stream takes for it, which the host does not wait for.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = self._now()
        with record_function(name):
            yield
        self._spans.append((name, begin, self._now()))

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """Seconds in each phase; on CUDA after a synchronisation."""
        sums: dict[str, float] = {}
        for name, begin, end in self._spans:
            taken = begin.elapsed_time(end) / 1e3 if self._on_cuda else end - begin
            sums[name] = sums.get(name, 0.0) + taken
        return sums


class _Recording(NamedTuple):
    """Steps that are being recorded, from `first` on."""

    first: int
    profiler: profile
    phases: Phases


class StepProfiler:
    """Records the steps of `config.profile_steps` on this rank; no collective is involved."""

    def __init__(
        self,
        config: LoggingConfig,
        run_dir: Path,
        engine: Engine,
        *,
        rank: int,
    ) -> None:
        self._config, self._engine, self._rank = config, engine, rank
        self._folder = run_dir / "profile"
        self._device = engine.ctx.device
        self._recording: _Recording | None = None
        self._last_step = 0

    def starts_at(self, step: int) -> bool:
        """Whether `step` is the first one to record; a resumed run may begin within a range."""
        return self._recording is None and self._range_of(step) is not None

    def start(self, step: int) -> None:
        """Record from `step` on, which is the next one."""
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        if self._config.memory_snapshot:
            torch.cuda.memory._record_memory_history()
        profiler = profile(activities=activities)
        profiler.start()
        self._recording = _Recording(step, profiler, Phases(self._device))

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """The step itself, without what the run does between steps."""
        if self._recording is None:
            yield
            return
        self._last_step = step
        self._engine.record_phases(self._recording.phases)
        try:
            with record_function(f"step {step}"), self._recording.phases("step"):
                yield
        finally:
            self._engine.record_phases(None)

    def ends_at(self, step: int) -> bool:
        """Whether `step` is the last one of what is being recorded."""
        found = self._range_of(step)
        return self._recording is not None and (found is None or found[1] == step)

    def end(self) -> str | None:
        """Write what has been recorded, if anything; returns where it is and the share of phases.

        After a stop, a rollback or an error that is the part of the range up to then.
        """
        if self._recording is None:
            return None
        recording, self._recording = self._recording, None
        recording.profiler.stop()
        folder = self._folder / f"steps_{recording.first}_{max(self._last_step, recording.first)}"
        try:
            return self._write(recording, folder)
        except (OSError, RuntimeError) as error:
            logger.warning("rank %d: no profile in %s: %s", self._rank, folder, error)
            return None
        finally:
            if self._config.memory_snapshot:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, recording: _Recording, folder: Path) -> str:
        name = f"rank_{self._rank}"
        with _published(folder, name) as part:
            shares = self._write_files(recording, part, name, title=folder.name)
        return f"profile in {folder}: {shares}"

    def _write_files(self, recording: _Recording, folder: Path, name: str, *, title: str) -> str:
        if self._config.memory_snapshot:
            torch.cuda.memory._dump_snapshot(str(folder / f"{name}.memory.pickle"))
        _write_trace(recording.profiler, folder / f"{name}.json.gz")
        shares = describe_phases(recording.phases.seconds())
        on_cuda = self._device.type == "cuda"
        operators = operators_by_self_time(recording.profiler.key_averages(), on_cuda=on_cuda)
        text = "\n".join([title, shares, "", *operators, ""])
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        return shares

    def _range_of(self, step: int) -> tuple[int, int] | None:
        ranges = self._config.profile_steps
        return next((each for each in ranges if each[0] <= step <= each[1]), None)


@contextmanager
def _published(folder: Path, name: str) -> Iterator[Path]:
    """A folder whose files are moved to `folder` if the body succeeds, and removed otherwise."""
    part = folder / f".{name}"
    part.mkdir(parents=True, exist_ok=True)  # a killed run has left it
    try:
        yield part
        for path in sorted(part.iterdir()):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_trace(profiler: profile, path: Path) -> None:
    """Write a compressed Chrome trace.

    Torch compresses from its own temporary file, does not say when that disk is full, and leaves
    an empty trace. So it is written here, and its end is looked at.

    Raises:
        OSError: the disk is full.
    """
    raw = path.with_suffix("")
    profiler.export_chrome_trace(str(raw))
    with raw.open("rb") as trace:
        trace.seek(max(raw.stat().st_size - _TRACE_END_BYTES, 0))
        end = trace.read().rstrip()
        if _TRACE_END not in end or not end.endswith(b"}"):
            raise OSError(f"{raw} is not whole; is its disk full?")
        trace.seek(0)
        with gzip.open(path, "wb") as compressed:
            shutil.copyfileobj(trace, compressed)
    raw.unlink()


def describe_phases(seconds: Mapping[str, float]) -> str:
    """`forward 31 %, backward 52 %, ..., other 4 % of 1.234 s` from the seconds of `Phases`."""
    total = seconds.get("step", 0.0)
    if not total:
        return "no step was completed"
    parts = {name: value for name, value in seconds.items() if name != "step"}
    parts["other"] = max(total - sum(parts.values()), 0.0)
    listed = ", ".join(f"{name} {value / total:.0%}" for name, value in parts.items())
    return f"{listed} of {total:.3f} s"


def operators_by_self_time(averages: Sequence[Any], *, on_cuda: bool) -> list[str]:
    """The operators that take most time of their own, on the device where there is one."""
    name = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    times = {
        each.key: (getattr(each, name), each.count)
        for each in averages
        if each.device_type == DeviceType.CPU and not each.is_user_annotation
    }
    total = sum(micros for micros, _ in times.values()) or 1
    lines = [f"{'self time':>12} {'share':>6} {'calls':>8}  operator"]
    top = sorted(times.items(), key=lambda item: -item[1][0])[:_NUM_OPERATORS]
    for key, (micros, calls) in top:
        lines.append(f"{micros / 1e3:>9.3f} ms {micros / total:>6.1%} {calls:>8}  {key}")
    return lines
