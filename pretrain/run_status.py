"""How a run ended, as a file in its directory: launchers do not pass exit codes on."""

from __future__ import annotations

from pathlib import Path

from parallel.checkpoint.storage import Storage
from pretrain.errors import EXIT_COMPLETED, EXIT_STOPPED

# STOP, which asks a run to stop and not to come back, is the user's and stays where it is.
MARKERS = {EXIT_COMPLETED: "DONE", EXIT_STOPPED: "REQUEUE"}


def clear_markers(run_dir: Path) -> None:
    """Take away what an earlier run of this directory left: this one has not ended."""
    for name in MARKERS.values():
        (run_dir / name).unlink(missing_ok=True)


def write_marker(run_dir: Path, code: int) -> None:
    """Say that the run ended with exit code `code`; rank 0 calls it once every rank has saved."""
    Storage().replace_file(run_dir / MARKERS[code], b"")
