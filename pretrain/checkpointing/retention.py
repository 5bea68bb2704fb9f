"""Retention: selection and deletion of old checkpoints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.lock import RunLock
from parallel.checkpoint.manifest import read_manifest, verify_listing
from parallel.checkpoint.storage import Storage
from pretrain.checkpointing.selection import steps_in


def surplus(steps: Sequence[int], *, keep: int, keep_every: int | None) -> list[int]:
    """Steps to delete: neither among the newest `keep` nor multiples of `keep_every`.

    `steps`: newest first.
    """
    older = steps[keep:]
    return [step for step in older if keep_every is None or step % keep_every]


def delete(directory: Path, step: int, storage: Storage) -> None:
    """Delete the checkpoint of a step."""
    doomed = directory / f".delete-step_{step}-{os.urandom(4).hex()}"
    # Renamed first: an interrupted deletion must not look like a checkpoint.
    storage.rename(directory / f"step_{step}", doomed)
    storage.remove_tree(doomed)


def prune(run_dir: Path, *, keep: int, keep_every: int | None) -> list[int]:
    """Delete surplus checkpoints of a run that no job is training; returns their steps.

    Damaged ones are not counted and are kept for inspection.

    Raises:
        CheckpointError: another job uses the run directory, or nothing would be kept.
        OSError: a checkpoint cannot be deleted.
    """
    if keep < 1:
        raise CheckpointError(f"--keep {keep} would keep nothing: give 1 or more")
    if keep_every is not None and keep_every < 1:
        raise CheckpointError(f"--keep-every {keep_every} is no number of steps: give 1 or more")
    lock = RunLock(run_dir)
    try:
        directory = run_dir / "checkpoints"
        complete = [
            step for step in steps_in(directory) if _is_complete(directory / f"step_{step}")
        ]
        doomed = surplus(complete, keep=keep, keep_every=keep_every)
        for step in doomed:
            delete(directory, step, Storage())
    finally:
        lock.release()
    return doomed


def _is_complete(path: Path) -> bool:
    try:
        return verify_listing(path, read_manifest(path)) is None
    except CheckpointError:
        return False
