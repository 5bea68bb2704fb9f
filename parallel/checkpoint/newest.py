"""The newest checkpoint of a run, as seen from outside of it, while it may be training."""

from __future__ import annotations

from pathlib import Path

from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.manifest import MANIFEST_NAME, step_of_name
from parallel.checkpoint.rollback_record import Rollbacks, missing_checkpoint, read_rollbacks


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint `step_N` with the highest step of a run; None if there is none.

    A rollback counts from the moment at which it is recorded: checkpoints newer than the one
    returned to are passed over though they have not been deleted yet.

    Raises:
        CheckpointError: the record of rollbacks is damaged, or the checkpoint that the last one
            returned to is missing.
    """
    folder = run_dir / "checkpoints"
    rollbacks = read_rollbacks(folder)
    while True:
        steps = _complete_steps(folder)
        before, rollbacks = rollbacks, read_rollbacks(folder)
        if rollbacks == before:  # else the list may be of before a rollback
            return _newest(folder, steps, rollbacks)


def find_manifest(path: Path) -> Path:
    """Find the manifest of a checkpoint (`step_N`), its weights directory, or a run's newest one.

    Raises:
        CheckpointError: there is none.
    """
    for directory in (path, newest_checkpoint(path), path.parent):
        if directory is not None and (directory / MANIFEST_NAME).is_file():
            return directory / MANIFEST_NAME
    raise CheckpointError(
        f"{path.absolute()} is no checkpoint and no run that has one; give the path of one"
    )


def _complete_steps(folder: Path) -> dict[int, Path]:
    return {
        step: entry
        for entry in (folder.iterdir() if folder.is_dir() else ())
        if (step := step_of_name(entry.name)) is not None and (entry / MANIFEST_NAME).is_file()
    }


def _newest(folder: Path, steps: dict[int, Path], rollbacks: Rollbacks | None) -> Path | None:
    if rollbacks is None or rollbacks.is_complete:
        return steps[max(steps)] if steps else None
    if rollbacks.returned_to not in steps:
        raise missing_checkpoint(folder, rollbacks)
    return steps[rollbacks.returned_to]
