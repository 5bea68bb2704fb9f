"""Permissions of the files and directories that a run writes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel.checkpoint.errors import CheckpointError

# Weights, corpus text (in samples and stack traces) and host names must not be world-readable on a
# cluster; they are readable by the group.
_NOT_FOR_OTHERS = stat.S_IWGRP | stat.S_IRWXO


@contextmanager
def private_files() -> Iterator[None]:
    """Create directories in the block with mode 0750 and files with 0640 at most.

    Implemented through the umask, the only setting that reaches every writer: ours, DeepSpeed's,
    TensorBoard's and W&B's, and every process and thread that they start. A stricter umask of the
    user is kept.
    """
    before = os.umask(_NOT_FOR_OTHERS)
    os.umask(before | _NOT_FOR_OTHERS)
    try:
        yield
    finally:
        os.umask(before)


def follow_umask(path: Path) -> None:
    """Give a file the mode of any new one: safetensors writes 0600, whatever the umask."""
    umask = os.umask(_NOT_FOR_OTHERS)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def refuse_if_others_can_write(path: Path) -> None:
    """Refuse a world-writable run directory: any user could plant a checkpoint in it.

    Raises:
        CheckpointError: `path` is world-writable; symbolic links are followed.
    """
    mode = path.stat().st_mode
    if mode & stat.S_IWOTH:
        raise CheckpointError(
            f"{str(path)!r} can be written by every user ({stat.filemode(mode)}), who could plant "
            "a checkpoint: run chmod o-w on it once you trust what is in it, or choose another "
            "run_dir"
        )
