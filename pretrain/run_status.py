"""Marker files that record how a run ended, because launchers do not forward exit codes."""

from __future__ import annotations

from pathlib import Path

from parallel.checkpoint.storage import Storage
from pretrain.errors import EXIT_COMPLETED, EXIT_STOPPED

# STOP, the user's request to stop and not to requeue, is never removed here.
MARKERS = {EXIT_COMPLETED: "DONE", EXIT_STOPPED: "REQUEUE"}


def clear_markers(run_dir: Path) -> None:
    """Remove the markers of an earlier run in this directory."""
    for name in MARKERS.values():
        (run_dir / name).unlink(missing_ok=True)


def write_marker(run_dir: Path, code: int) -> None:
    """Record exit code `code`; called by rank 0 once every rank has saved."""
    Storage().replace_file(run_dir / MARKERS[code], b"")
