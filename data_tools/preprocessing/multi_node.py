"""The processes that one command runs as, over any number of machines.

`mpirun` needs mpi4py. `srun` needs nothing: its ranks meet in a folder that they all see.
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
_BEAT_SECONDS = 10.0
_SILENT_SECONDS = 300.0  # without a sign of life a rank counts as dead
_OPEN_MPI, _MPICH, _SRUN = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"


class Ranks(Protocol):
    """This process among the others of the command."""

    rank: int
    size: int

    def gather(self, name: str, text: str, *, last: bool) -> list[str]:
        """The texts of all ranks that call it, in order of rank.

        At the last meeting, rank 0 alone is sure to get them; others get what they can without
        waiting.

        Raises:
            DataError: a rank is dead.
        """


class OneRank:
    """A command on its own."""

    rank, size = 0, 1

    def gather(self, name: str, text: str, *, last: bool) -> list[str]:
        return [text]


class MpiRanks:
    """Ranks that `mpirun` started."""

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
        # MPI's own waiting spins on a core that another rank's workers could use.
        barrier = self._world.Ibarrier()
        while not barrier.Test():
            time.sleep(_POLL_SECONDS)
        return self._world.allgather(text)


class FolderRanks:
    """Ranks that meet in a folder: each leaves its text as a file, and signs of life beside it."""

    def __init__(self, folder: Path, *, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._beat()
        threading.Thread(target=self._keep_beating, daemon=True).start()

    def gather(self, name: str, text: str, *, last: bool) -> list[str]:
        with replace_atomically(self._folder / f"{name}-{self.rank}") as file:
            file.write(text.encode("utf-8"))
        if last and self.rank > 0:
            return [text]
        texts = [self._wait_for(name, rank) for rank in range(self.size)]
        if last:
            # A sign of life may be written while it is removed: the rest goes with what is around.
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
                if time.monotonic() - begin > _SILENT_SECONDS and self._silence(rank):
                    raise DataError(
                        f"rank {rank} of {self.size} has given no sign of life for "
                        f"{_SILENT_SECONDS:.0f} s; see its log, then give the same command again"
                    ) from None
            time.sleep(_POLL_SECONDS)

    def _silence(self, rank: int) -> bool:
        """Whether a rank has been silent for too long, by the clock of the file system."""
        try:
            theirs = self._beat_path(rank).stat().st_mtime
        except FileNotFoundError:
            return True
        return self._beat_path(self.rank).stat().st_mtime - theirs > _SILENT_SECONDS

    def _beat_path(self, rank: int) -> Path:
        return self._folder / f"alive-{rank}"

    def _beat(self) -> None:
        self._beat_path(self.rank).write_bytes(b"")

    def _keep_beating(self) -> None:
        while True:
            time.sleep(_BEAT_SECONDS)
            try:
                self._beat()
            except OSError:  # rank 0 has removed the folder: all is done
                return


def find_ranks(
    meeting_place: Callable[[str], Path], environment: Mapping[str, str] = os.environ
) -> Ranks:
    """The ranks of this process, from what `mpirun` and `srun` set.

    `meeting_place` takes a name that this start of the command has and no other.

    Raises:
        DataError: `mpirun` started several and mpi4py is missing.
    """
    if _size(environment, _OPEN_MPI) > 1:
        return MpiRanks()
    if _size(environment, _SRUN) > 1:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        token = "-".join(environment.get(name, "0") for name in names)
        rank = int(environment["SLURM_PROCID"])
        return FolderRanks(meeting_place(token), rank=rank, size=_size(environment, _SRUN))
    return MpiRanks() if _size(environment, _MPICH) > 1 else OneRank()


def _size(environment: Mapping[str, str], name: str) -> int:
    return int(environment.get(name, "1"))
