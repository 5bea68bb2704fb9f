"""The run directory: space for the checkpoints, and the file operations that they rely on."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from models.registry import get_family
from parallel.checkpoint.file_modes import refuse_if_others_can_write
from pretrain.config import RunConfig
from pretrain.doctor.findings import Finding

SECTION = "run directory"
MAX_CLOCK_DIFFERENCE = 1.0  # seconds

_WEIGHT_BYTES = {"fp32": 4}  # other precisions: 2
_OPTIMIZER_BYTES = 12  # of a parameter: the fp32 weight and two moments; Muon has one for matrices


def check_run_directory(run_dir: Path) -> Iterator[Finding]:
    """Findings about rights, marker files and file operations; writes a probe file and removes it.

    Raises:
        CheckpointError: others can write to the directory.
    """
    if run_dir.is_dir():
        refuse_if_others_can_write(run_dir)
    for marker, meaning in (("DONE", "it trained to the end"), ("STOP", "a user stopped it")):
        if (run_dir / marker).exists():
            yield Finding(
                SECTION,
                "warning",
                f"{run_dir / marker} exists: {meaning}, and job scripts start nothing",
                f"remove {marker} to continue, or set another run_dir",
            )
    yield from probe(existing_folder(run_dir.absolute()))


def existing_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def probe(folder: Path, *, now: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Write, flush, rename, read and remove a file, and compare clocks by its time."""
    path = folder / f".doctor-{socket.gethostname()}-{os.getpid()}"
    renamed = path.with_name(path.name + "-renamed")
    try:
        with path.open("xb") as file:
            file.write(b"probe")
            file.flush()
            os.fsync(file.fileno())
        written = now()
        os.replace(path, renamed)
        _sync(folder)
        if renamed.read_bytes() != b"probe":
            raise OSError("a renamed file has other content")
        difference = renamed.stat().st_mtime - written
    except OSError as error:
        yield Finding(
            SECTION,
            "error",
            f"{folder}: a file cannot be written, flushed, renamed and read back there "
            f"({error.strerror or error})",
            "set run_dir to a folder that you can write to, on a file system with fsync and rename",
        )
        return
    finally:
        for each in (path, renamed):
            each.unlink(missing_ok=True)
    yield Finding(SECTION, "ok", f"{folder}: write, fsync, rename and read work")
    if abs(difference) > MAX_CLOCK_DIFFERENCE:
        yield Finding(
            SECTION,
            "warning",
            f"{folder}: the file system's clock is {difference:+.1f} s off that of "
            f"{socket.gethostname()}",
            "synchronise the clocks (chrony, NTP): times of logs and checkpoints do not agree",
        )


def check_space(config: RunConfig, folder: Path, *, total_steps: int | None) -> Finding:
    """Compare the free space with that of all checkpoints that will lie there at a time."""
    size, count = checkpoint_bytes(config), num_checkpoints(config, total_steps=total_steps)
    present = _bytes_below(Path(config.run_dir, "checkpoints"))
    free = shutil.disk_usage(folder).free
    needed = max(size * count - present, 0)
    for_rollbacks = "" if config.stability.spike is None else ", two that a rollback may need"
    what = (
        f"{count} checkpoints of {_gigabytes(size)} (checkpoint.keep={config.checkpoint.keep}"
        f"{for_rollbacks}, and the one being written) need {_gigabytes(needed)} more, and "
        f"{folder} has {_gigabytes(free)} free"
    )
    if needed <= free:
        return Finding(SECTION, "ok", what)
    return Finding(
        SECTION,
        "error" if free < size else "warning",  # a run that keeps fewer may still go on
        what,
        "set run_dir to a larger file system, or lower checkpoint.keep or raise keep_every",
    )


def checkpoint_bytes(config: RunConfig) -> int:
    """Size of a checkpoint: parameters times (weight + optimizer state), at most.

    Parameters are counted from the settings, without a model.
    """
    parameters = get_family(config.model.family).num_parameters(config.model)
    return parameters * (_WEIGHT_BYTES.get(config.training.precision, 2) + _OPTIMIZER_BYTES)


def num_checkpoints(config: RunConfig, *, total_steps: int | None) -> int:
    """Most checkpoints that lie in the run directory at a time."""
    settings = config.checkpoint
    kept = settings.keep + 1  # a new one is complete before the oldest is deleted
    if config.stability.spike is not None:
        kept += 2  # see checkpointing.retention.surplus
    if total_steps is not None:
        # By time a run may save after every step.
        interval = settings.interval if settings.interval_minutes is None else 1
        kept = min(kept, -(-total_steps // interval))
        if settings.keep_every is not None:
            kept += total_steps // settings.keep_every
    return kept


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
