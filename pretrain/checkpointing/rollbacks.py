"""RUN/checkpoints/rollbacks.json: the data that rollbacks skip, and the last step returned to.

A rollback writes it before anything else, and that write decides. A run that is killed before it
continues from its newest checkpoint and meets the spike again; after it, from the checkpoint that
it names, without these data. Newer checkpoints hold the data. They are deleted next, and a deletion
that is interrupted is completed before a run looks for a checkpoint; whatever else takes the newest
one of a run (`parallel.checkpoint.newest`) passes over them from the write on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from parallel.checkpoint.manifest import encode_manifest
from parallel.checkpoint.rollback_record import (
    ROLLBACKS_NAME,
    Rollbacks,
    SkippedData,
    missing_checkpoint,
    read_rollbacks,
)
from parallel.checkpoint.storage import Storage
from pretrain.checkpointing.directory import point_latest_to, set_aside, steps_in

logger = logging.getLogger(__name__)


def roll_back(
    directory: Path, step: int, skipped: Sequence[SkippedData], storage: Storage
) -> Rollbacks:
    """Return to the checkpoint of `step`: record what is skipped, delete newer checkpoints.

    Raises:
        CheckpointError, OSError: nothing has happened, or the next start completes it.
    """
    rollbacks = Rollbacks(returned_to=step, is_complete=False, skipped=tuple(skipped))
    _write(directory, rollbacks, storage)
    return _complete(directory, rollbacks, storage)


def complete_interrupted(directory: Path, storage: Storage) -> Rollbacks | None:
    """Complete a rollback that was interrupted; returns the content of the file.

    Raises:
        CheckpointError, OSError: the file is damaged, or the rollback cannot be completed.
    """
    rollbacks = read_rollbacks(directory)
    if rollbacks is None or rollbacks.is_complete:
        return rollbacks
    logger.warning("completing an interrupted rollback to step_%d", rollbacks.returned_to)
    return _complete(directory, rollbacks, storage)


def forget(directory: Path, storage: Storage) -> None:
    """Remove the file, of a run whose checkpoints were all removed, before another one starts."""
    logger.warning(
        "removing %s: there are no checkpoints, so the run starts from the beginning and skips "
        "nothing",
        directory / ROLLBACKS_NAME,
    )
    storage.unlink(directory / ROLLBACKS_NAME)
    storage.sync(directory)


def _write(directory: Path, rollbacks: Rollbacks, storage: Storage) -> None:
    content = encode_manifest(rollbacks.model_dump(mode="json"))
    storage.replace_file(directory / ROLLBACKS_NAME, content)
    storage.sync(directory)


def _complete(directory: Path, rollbacks: Rollbacks, storage: Storage) -> Rollbacks:
    step = rollbacks.returned_to
    if step not in steps_in(directory):
        raise missing_checkpoint(directory, rollbacks)
    # Moved while the checkpoint that it names still exists.
    point_latest_to(directory, step, storage)
    newer = [each for each in steps_in(directory) if each > step]
    # All are set aside before the first is removed, which takes longer.
    doomed = [set_aside(directory, each, storage) for each in newer]
    storage.sync(directory)
    for path in doomed:
        try:
            storage.remove_tree(path)
        except OSError as error:  # no longer a checkpoint; the next start removes it
            logger.warning("%s could not be removed: %s", path, error)
    rollbacks = rollbacks.model_copy(update={"is_complete": True})
    _write(directory, rollbacks, storage)
    return rollbacks
