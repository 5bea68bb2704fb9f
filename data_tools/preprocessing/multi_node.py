"""Communication between the processes of one command across machines.

`mpirun` needs mpi4py. `srun` needs nothing: its ranks communicate through a shared folder.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from data_tools.errors import DataError
from data_tools.files import replace_atomically

_POLL_SECONDS = 0.2
_HEARTBEAT_SECONDS = 10.0
_HEARTBEAT_TIMEOUT_SECONDS = 300.0  # a rank without a heartbeat for longer counts as dead
_OPEN_MPI, _MPICH, _SRUN = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"


class Communicator(Protocol):
    """Rank and size of this process in the command, and a gather over all ranks."""

    rank: int
    size: int

    def gather(self, name: str, text: str, *, last: bool) -> list[str]:
        """Return the texts of all ranks that call it, in rank order.

        In the `last` call only rank 0 is guaranteed all texts; the others return what they have
        without waiting.

        Raises:
            DataError: a rank is dead.
        """


class SingleRank:
    """Communicator of a command with one process."""

    rank, size = 0, 1

    def gather(self, name: str, text: str, *, last: bool) -> list[str]:
        return [text]


class MpiCommunicator:
    """Communicator of ranks started by `mpirun`."""

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise DataError(
                f"started by mpirun, but mpi4py cannot be imported ({error}); pip install "
                "'manyformer[mpi]', or start it with srun"
            ) from error
        self._world: Any = MPI.COMM_WORLD
        self.rank, self.size = self._world.Get_rank(), self._world.Get_size()

    def gather(self, name: str, text: str, *, last: bool) -> list[str]:
        # A blocking MPI call busy-waits on a core that another rank's workers could use.
        barrier = self._world.Ibarrier()
        while not barrier.Test():
            time.sleep(_POLL_SECONDS)
        return self._world.allgather(text)


class FolderCommunicator:
    """Communicator over a shared folder: each rank writes its texts and heartbeats as files."""

    def __init__(self, folder: Path, *, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._send_heartbeat()
        threading.Thread(target=self._send_heartbeats, daemon=True).start()

    def gather(self, name: str, text: str, *, last: bool) -> list[str]:
        with replace_atomically(self._folder / f"{name}-{self.rank}") as file:
            file.write(text.encode("utf-8"))
        if last and self.rank > 0:
            return [text]
        texts = [self._wait_for(name, rank) for rank in range(self.size)]
        if last:
            # A heartbeat may be written during removal: its file is then removed with the parent.
            shutil.rmtree(self._folder, ignore_errors=True)
            with suppress(OSError):
                self._folder.parent.rmdir()
        return texts

    def _wait_for(self, name: str, rank: int) -> str:
        path, begin = self._folder / f"{name}-{rank}", time.monotonic()
        while True:
            try:
                return path.read_text(encoding="utf-8")
            except FileNotFoundError:
                is_late = time.monotonic() - begin > _HEARTBEAT_TIMEOUT_SECONDS
                if is_late and self._is_silent(rank):
                    raise DataError(
                        f"rank {rank} of {self.size} has sent no heartbeat for "
                        f"{_HEARTBEAT_TIMEOUT_SECONDS:.0f} s; see its log, then run the same "
                        "command again"
                    ) from None
            time.sleep(_POLL_SECONDS)

    def _is_silent(self, rank: int) -> bool:
        """Return whether a rank's heartbeat is too old, by the clock of the file system."""
        try:
            theirs = self._heartbeat_path(rank).stat().st_mtime
        except FileNotFoundError:
            return True
        ours = self._heartbeat_path(self.rank).stat().st_mtime
        return ours - theirs > _HEARTBEAT_TIMEOUT_SECONDS

    def _heartbeat_path(self, rank: int) -> Path:
        return self._folder / f"alive-{rank}"

    def _send_heartbeat(self) -> None:
        self._heartbeat_path(self.rank).write_bytes(b"")

    def _send_heartbeats(self) -> None:
        while True:
            time.sleep(_HEARTBEAT_SECONDS)
            try:
                self._send_heartbeat()
            except OSError:  # rank 0 has removed the folder: the command is done
                return


def find_communicator(
    rendezvous_folder: Callable[[str], Path], environment: Mapping[str, str] = os.environ
) -> Communicator:
    """Create the communicator for the environment that `mpirun` or `srun` has set.

    Args:
        rendezvous_folder: Maps a name that is unique to this start of the command to a folder.

    Raises:
        DataError: `mpirun` started several ranks and mpi4py is missing.
    """
    if _size(environment, _OPEN_MPI) > 1:
        return MpiCommunicator()
    if _size(environment, _SRUN) > 1:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        token = "-".join(environment.get(name, "0") for name in names)
        rank = int(environment["SLURM_PROCID"])
        size = _size(environment, _SRUN)
        return FolderCommunicator(rendezvous_folder(token), rank=rank, size=size)
    return MpiCommunicator() if _size(environment, _MPICH) > 1 else SingleRank()


def _size(environment: Mapping[str, str], name: str) -> int:
    return int(environment.get(name, "1"))
