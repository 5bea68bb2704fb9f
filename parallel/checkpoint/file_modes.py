"""Who may read and write what a run leaves on a disk."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel.checkpoint.errors import CheckpointError

# Weights, text of the corpus in samples and stacks, and host names are not for everybody on a
# cluster; colleagues of the group may look.
_NOT_FOR_OTHERS = stat.S_IWGRP | stat.S_IRWXO


@contextmanager
def private_files() -> Iterator[None]:
    """Directories made in the block get 0750 at most and files 0640, whatever the user's umask is.

    The umask is the one place that reaches every writer: ours, DeepSpeed's, those of TensorBoard
    and W&B, and every process and thread that they start. A stricter one stays as it is.
    """
    before = os.umask(_NOT_FOR_OTHERS)
    os.umask(before | _NOT_FOR_OTHERS)
    try:
        yield
    finally:
        os.umask(before)


def refuse_if_others_can_write(path: Path) -> None:
    """Whoever can write into a run directory decides what the run continues from.

    Raises:
        CheckpointError: the mode of `path` lets everybody write; symbolic links are followed.
    """
    mode = path.stat().st_mode
    if mode & stat.S_IWOTH:
        raise CheckpointError(
            f"{str(path)!r} can be written by every user ({stat.filemode(mode)}), who could plant "
            "a checkpoint: run chmod o-w on it once you trust what is in it, or choose another "
            "run_dir"
        )
