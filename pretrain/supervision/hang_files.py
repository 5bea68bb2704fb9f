"""Files that each rank leaves in the run directory when a run hangs."""

from __future__ import annotations

import faulthandler
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from parallel.checkpoint.errors import one_line
from pretrain.supervision.flight_recorder import write_records

NAMES = "stacks_rank_*.txt, flight_recorder_rank_*.json"


def write_hang_files(folder: Path, rank: int, *, with_collectives: bool) -> str | None:
    """Write the stacks of all threads and the collectives; returns why that failed, if it did.

    The first line says when, because a rank that is dead leaves the file of an earlier hang.
    """
    path = folder / f"stacks_rank_{rank:05d}.txt"
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        with path.open("w") as file:
            file.write(f"{_now()}, rank {rank}, process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        if with_collectives:
            write_collectives(folder, rank)
    except (OSError, RuntimeError, ValueError) as error:  # of torch's recorder, of its JSON
        return f"the stacks could not be written: {one_line(error)}"
    return None


def _now() -> str:
    return datetime.now(UTC).isoformat(sep=" ", timespec="seconds")


def write_collectives(folder: Path, rank: int) -> None:
    """Write what torch's flight recorder has kept.

    Raises:
        OSError: the file cannot be written.
    """
    folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    write_records(folder / f"flight_recorder_rank_{rank:05d}.json")
