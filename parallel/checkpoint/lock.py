"""The lock that allows one job per run directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.file_modes import refuse_if_others_can_write

LOCK_NAME = "run.lock"


class RunLock:
    """An exclusive lock on a run directory, held until `release` or the end of the process.

    A directory that was made for it is removed at `release` if nothing came into it, as when a
    start is refused.

    A POSIX record lock: the kernel (over NFS: the server) drops it when the owner dies, so stale
    locks cannot exist, and forked data workers do not inherit it.

    Raises:
        CheckpointError: another process holds it (the message says which and since when), or the
            directory cannot be created or written, or is world-writable.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOCK_NAME
        self._descriptor = -1
        self._is_new = False
        try:
            is_new = _is_made(run_dir)
            refuse_if_others_can_write(run_dir)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o640)
            refuse_if_others_can_write(self._path)
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self.is_held():  # its last owner removed it between these two calls
                raise FileNotFoundError(errno.ENOENT, "another process has just removed it")
            self._is_new = is_new  # not before it is locked: it may be another process's by then
            os.truncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(_own_description()).encode(), 0)
        except (BlockingIOError, PermissionError) as error:
            if self._descriptor < 0:
                raise _unusable(run_dir, error) from error
            owner = self._describe_owner()
            self.release()
            raise CheckpointError(
                f"run_dir {str(run_dir)!r} is in use by {owner}: "
                "wait until that job ends or choose another run_dir"
            ) from None
        except CheckpointError:
            self.release()
            raise
        except OSError as error:
            self.release()
            raise _unusable(run_dir, error) from error

    def is_held(self) -> bool:
        """False once the lock file has been removed or replaced: nothing may be published then."""
        # Never reopen the path: closing any descriptor of the file would drop the lock.
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except OSError:
            return False

    def release(self) -> None:
        if self._descriptor >= 0:
            if self._is_new and self.is_held():
                _remove_unused(self._path)
            os.close(self._descriptor)
            self._descriptor = -1

    def _describe_owner(self) -> str:
        try:
            owner = json.loads(os.pread(self._descriptor, 4096, 0))
            job = f", job {owner['job']}" if owner["job"] else ""
            return f"process {owner['pid']} on {owner['host']} since {owner['since']}{job}"
        except (ValueError, KeyError, TypeError):
            return "another process"


def _is_made(run_dir: Path) -> bool:
    """Make a directory if there is none; whether it was made here."""
    # Not asked beforehand: another process may make it in between.
    try:
        run_dir.mkdir(parents=True)
    except OSError:  # it exists, or an error that pathlib tells from that
        run_dir.mkdir(parents=True, exist_ok=True)
        return False
    return True


def _remove_unused(path: Path) -> None:
    """Remove the directory of the lock file `path` if it holds nothing else but empty folders."""
    with suppress(OSError):
        others = [entry for entry in path.parent.iterdir() if entry != path]
        if all(entry.is_dir() and not any(entry.iterdir()) for entry in others):
            for entry in others:
                entry.rmdir()
            path.unlink()
            path.parent.rmdir()


def _unusable(run_dir: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"run_dir {str(run_dir)!r} cannot be written ({error.strerror}): choose a writable one"
    )


def _own_description() -> dict[str, object]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "job": os.environ.get("SLURM_JOB_ID", ""),
    }
