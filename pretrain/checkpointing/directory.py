"""RUN/checkpoints/: the checkpoints in it, `latest`, and deletions.

An interrupted deletion leaves nothing that looks like a checkpoint.
"""

from __future__ import annotations

import os
from pathlib import Path

from parallel.checkpoint.manifest import step_of_name
from parallel.checkpoint.storage import Storage

LATEST_NAME = "latest"


def steps_in(directory: Path) -> list[int]:
    """The N of all entries `step_N`, newest first; symbolic links are ignored."""
    if not directory.is_dir():
        return []
    steps = ((step_of_name(entry.name), entry) for entry in directory.iterdir())
    return sorted((n for n, e in steps if n is not None and not e.is_symlink()), reverse=True)


def point_latest_to(directory: Path, step: int, storage: Storage) -> None:
    """Write `latest`."""
    storage.replace_file(directory / LATEST_NAME, f"step_{step}\n".encode())
    storage.sync(directory)


def set_aside(directory: Path, step: int, storage: Storage) -> Path:
    """Rename the checkpoint of a step, so that it is none any more; returns the path to remove."""
    doomed = directory / f".delete-step_{step}-{os.urandom(4).hex()}"
    storage.rename(directory / f"step_{step}", doomed)
    return doomed


def delete(directory: Path, step: int, storage: Storage) -> None:
    """Delete the checkpoint of a step."""
    storage.remove_tree(set_aside(directory, step, storage))
