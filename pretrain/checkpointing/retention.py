"""Retention: which old checkpoints are deleted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.lock import RunLock
from parallel.checkpoint.manifest import read_manifest, verify_listing
from parallel.checkpoint.storage import Storage
from pretrain.checkpointing.directory import delete, steps_in
from pretrain.checkpointing.rollbacks import complete_interrupted


def surplus(
    steps: Sequence[int], *, keep: int, keep_every: int | None, skip_before: int | None = None
) -> list[int]:
    """Steps to delete: neither among the newest `keep`, nor multiples of `keep_every`, nor needed
    by a rollback.

    A loss spike in the next step returns to a checkpoint at least `skip_before` steps before the
    newest, so one such is kept. It is replaced by the oldest of the later ones, which is kept for
    that and becomes old enough in time: of those among the newest `keep` none might. None: there
    are no rollbacks.

    `steps`: newest first.
    """
    kept = set(steps[:keep])
    if skip_before is not None:
        later = [step for step in steps if step > steps[0] - skip_before]
        kept.update(steps[len(later) :][:1], later[-1:])
    return [
        step for step in steps if step not in kept and (keep_every is None or step % keep_every)
    ]


def prune(run_dir: Path, *, keep: int, keep_every: int | None) -> list[int]:
    """Delete surplus checkpoints of a run that no job is training; returns their steps.

    Damaged ones are not counted and are kept for inspection. An interrupted rollback is completed
    first.

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
        complete_interrupted(directory, Storage())  # or the checkpoint returned to might go
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
