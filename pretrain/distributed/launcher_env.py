"""Translation of every launcher's environment variables into those that torch reads."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from pretrain.errors import ConfigError

Environment = MutableMapping[str, str]


class _Launcher(NamedTuple):
    """The variables in which a launcher passes rank, local rank and world size."""

    name: str
    rank: str
    local_rank: str
    size: str

    @property
    def is_mpi(self) -> bool:
        return self.name != "srun"


# In this order: mpirun inside a Slurm job starts its processes through srun.
_LAUNCHERS = (
    _Launcher(
        "Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"
    ),
    _Launcher("MPICH", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
    _Launcher("MVAPICH", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE"),
    # SLURM_NTASKS is that of the whole job, even for a single process in its batch script.
    _Launcher("srun", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
)
# Ranks on this machine: of torchrun and accelerate, deepspeed, Open MPI, MPICH, MVAPICH, srun.
_LOCAL_SIZES = (
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "SLURM_STEP_TASKS_PER_NODE",
)
_NODES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,\[\]-]*")


def adopt_launcher(environment: Environment = os.environ) -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT under mpirun or srun.

    Does nothing under launchers that set RANK themselves (torchrun, deepspeed, accelerate), nor in
    a single process. A given address is kept; otherwise MPI ranks meet at a free port of rank 0,
    and srun's on the first node of their step.

    Raises:
        ConfigError: the ranks cannot find each other.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return
    launcher = _find_launcher(environment)
    if launcher is None or environment[launcher.size] == "1":
        return
    if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
        find = _rendezvous_of_mpi if launcher.is_mpi else _rendezvous_of_slurm
        address, port = find(launcher, environment)
        environment["MASTER_ADDR"], environment["MASTER_PORT"] = address, str(port)
    environment["RANK"] = environment[launcher.rank]
    environment["LOCAL_RANK"] = environment[launcher.local_rank]
    environment["WORLD_SIZE"] = environment[launcher.size]


def launcher_name(environment: Mapping[str, str] = os.environ) -> str | None:
    """Name of the launcher that passes ranks through `environment`; None: a single process."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return "RANK and WORLD_SIZE (torchrun, deepspeed or accelerate)"
    launcher = _find_launcher(environment)
    return None if launcher is None else launcher.name


def _find_launcher(environment: Mapping[str, str]) -> _Launcher | None:
    for launcher in _LAUNCHERS:
        if all(name in environment for name in launcher[1:]):
            return launcher
    return None


def ranks_on_this_machine(environment: Environment = os.environ) -> int:
    """Number of ranks that the launcher started on this machine; 1 for a single process."""
    for name in _LOCAL_SIZES:
        number = re.match("[0-9]+", environment.get(name, ""))  # srun writes 8(x2) for two nodes
        if number is not None:
            return max(1, int(number[0]))
    return 1


def _rendezvous_of_slurm(launcher: _Launcher, environment: Environment) -> tuple[str, int]:
    nodes = environment["SLURM_STEP_NODELIST"]
    if not _NODES.fullmatch(nodes):  # a leading - would be an option of scontrol
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes!r} is no list of nodes; unset it")
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"MASTER_ADDR is not set and scontrol cannot list {nodes} ({error}); "
            "export MASTER_ADDR and MASTER_PORT before srun"
        ) from error
    # Below the ephemeral port range; the same on every rank of the step.
    job, step = (
        environment_number(name, environment=environment)
        for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")
    )
    return done.stdout.split()[0], 10000 + (job + step) % 20000


def environment_number(
    name: str, default: int | None = None, environment: Environment = os.environ
) -> int:
    """Read a variable as a whole number from 0; `default` if it is not set.

    Raises:
        ConfigError: it holds something else.
    """
    text = environment[name] if default is None else environment.get(name, str(default))
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"environment variable {name}={text!r} must be a whole number; unset it")
    return int(text)


def _rendezvous_of_mpi(launcher: _Launcher, environment: Environment) -> tuple[str, int]:
    try:
        import mpi4py

        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"MASTER_ADDR is not set and mpi4py cannot be used ({error}); install the extra `mpi`, "
            "or pass MASTER_ADDR and MASTER_PORT through mpirun"
        ) from error
    size = MPI.COMM_WORLD.Get_size()
    if size != int(environment[launcher.size]):
        raise ConfigError(
            f"mpi4py sees {size} ranks and {launcher.size} is {environment[launcher.size]}: it "
            f"uses another MPI library than {launcher.name}; set MPI4PY_MPIABI and LD_LIBRARY_PATH"
        )
    here = (socket.gethostname(), _free_port()) if MPI.COMM_WORLD.Get_rank() == 0 else None
    there: tuple[str, int] = MPI.COMM_WORLD.bcast(here, root=0)
    MPI.Finalize()  # only needed to exchange the address; torch does the rest
    return there


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
