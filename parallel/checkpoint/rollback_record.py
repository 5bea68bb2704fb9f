"""The record of a run's rollbacks, RUN/checkpoints/rollbacks.json.

Written by a run (`pretrain.checkpointing.rollbacks`), read by all that take its newest checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.manifest import decode_manifest

ROLLBACKS_NAME = "rollbacks.json"
_STRICT = ConfigDict(frozen=True, strict=True, extra="forbid")
_RESTORE = (
    "restore it, or delete it where a checkpoint was saved since the last rollback, which also "
    "knows what to skip"
)


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
        CheckpointError: it cannot be read, or is damaged.
    """
    path = directory / ROLLBACKS_NAME
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read ({error.strerror}): {_RESTORE}"
        ) from error
    content = decode_manifest(raw, path, remedy=_RESTORE)
    try:
        return Rollbacks.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise CheckpointError(
            f"{str(path)!r} is not a record of rollbacks ({error.errors()[0]['msg']}): {_RESTORE}"
        ) from error


def missing_checkpoint(directory: Path, rollbacks: Rollbacks) -> CheckpointError:
    """The error for a rollback that is not complete, to a checkpoint that is not in `directory`."""
    return CheckpointError(
        f"{str(directory / ROLLBACKS_NAME)!r} is of a rollback to step_{rollbacks.returned_to}, "
        "which is missing: restore it, or delete that file to continue from another checkpoint, "
        "which may hold the data to be skipped"
    )
