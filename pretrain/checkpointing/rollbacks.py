"""RUN/checkpoints/rollbacks.json: the data that rollbacks skip, and the last step returned to.

A rollback writes it before anything else, and that write decides. A run that is killed before it
continues from its newest checkpoint and meets the spike again; after it, from the checkpoint that
it names, without these data. Newer checkpoints hold the data. They are deleted next, and a deletion
that is interrupted is completed before anything looks for a checkpoint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.manifest import decode_manifest, encode_manifest
from parallel.checkpoint.storage import Storage
from pretrain.checkpointing.directory import point_latest_to, set_aside, steps_in

ROLLBACKS_NAME = "rollbacks.json"
_STRICT = ConfigDict(frozen=True, strict=True, extra="forbid")
_RESTORE = (
    "restore it, or delete it where a checkpoint was saved since the last rollback, which also "
    "knows what to skip"
)
logger = logging.getLogger(__name__)


class SkippedData(BaseModel):
    """Data that a rollback skips: [first, last] step, and the samples [first, end) of the run.

    Steps are counted as when they were taken; a later change of the batch may put the samples in
    other ones. `samples`: None in checkpoints of earlier versions.
    """

    model_config = _STRICT

    steps: tuple[int, int]
    samples: tuple[int, int] | None = None


class Rollbacks(BaseModel):
    """The content of the file.

    `returned_to`: step of the checkpoint that the newest rollback returned to. `is_complete`: all
    checkpoints that were newer then are deleted. `skipped`: by all rollbacks, in order.
    """

    model_config = _STRICT

    format_version: Literal[1] = 1
    returned_to: int
    is_complete: bool
    skipped: tuple[SkippedData, ...]


def read_rollbacks(directory: Path) -> Rollbacks | None:
    """Read the file in `checkpoints/`; None if there was no rollback.

    Raises:
        CheckpointError: it is damaged.
        OSError: it cannot be read.
    """
    path = directory / ROLLBACKS_NAME
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    content = decode_manifest(raw, path, remedy=_RESTORE)
    try:
        return Rollbacks.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise CheckpointError(
            f"{str(path)!r} is not a record of rollbacks ({error.errors()[0]['msg']}): {_RESTORE}"
        ) from error


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
        raise CheckpointError(
            f"{str(directory / ROLLBACKS_NAME)!r} is of a rollback to step_{step}, which is "
            "missing: restore it, or delete that file to continue from another checkpoint, which "
            "may hold the data to be skipped"
        )
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
