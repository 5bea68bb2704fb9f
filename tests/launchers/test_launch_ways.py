"""Rank, world size and rendezvous address are found under every launcher."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.distributed.launcher_env import adopt_launcher
from pretrain.errors import ConfigError
from tests.launchers.cluster import ROOT, Cluster

SHOW = "tests/launchers/show_place.py"
BIN = Path(sys.executable).parent
ARGUMENT = "data.train=a 'quoted' path; with a space"
# DeepSpeed's ssh launcher hands arguments to a shell on every node, which looks for these.
EXPANDED = " $HOME $(hostname)"

# Each is a line of a job of two nodes with two ranks on each; SHOW and the arguments follow.
WAYS = {
    "srun, a task per rank": "srun --ntasks-per-node=2 --ntasks=4 python",
    "mpirun of Open MPI": "mpirun.openmpi --allow-run-as-root --oversubscribe -N 2 -n 4 python",
    "torchrun": (
        "srun --ntasks=2 --ntasks-per-node=1 bash -c 'exec torchrun --nnodes=2 --nproc-per-node=2 "
        '--node-rank=$SLURM_PROCID --master-addr=$(head -n1 hostfile | cut -d" " -f1) '
        '--master-port=$0 "$@"\' $port'
    ),
    "deepspeed --launcher slurm": (
        "deepspeed --hostfile hostfile --launcher slurm --no_ssh_check "
        "--launcher_args=--ntasks-per-node=2"
    ),
    "deepspeed over ssh": "deepspeed --hostfile hostfile --master_port $port",
    "deepspeed --launcher openmpi": (
        "deepspeed --hostfile hostfile --launcher openmpi --no_ssh_check "
        "--launcher_args='--oversubscribe'"
    ),
    "deepspeed --launcher mpich": (
        "MPI4PY_MPIABI=mpich deepspeed --hostfile hostfile --launcher mpich --no_ssh_check"
    ),
}
SLOW = [way for way in WAYS if way.startswith("deepspeed") or way == "torchrun"]
NEEDS = {"deepspeed over ssh": "pdsh", "deepspeed --launcher mpich": "mpirun.mpich"}

JOB = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=2 --gpus-per-node=2 --exclusive
set -e
cd {root}
launchers/hostfile.sh 2 > {directory}/hostfile
cd {directory}
export PATH={directory}/bin:{bin}:$PATH PYTHONPATH={root} DS_ACCELERATOR=cpu
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
port=$((10000 + SLURM_JOB_ID % 20000))
{way} {root}/{show} "{argument}" {directory}/places
"""


def _start(cluster: Cluster, directory: Path, way: str, argument: str) -> list[dict[str, Any]]:
    (directory / "places").mkdir()
    (directory / "bin").mkdir()
    if "mpich" in way:
        # Hydra looks for its helpers beside itself, so this cannot be a link.
        wrapper = directory / "bin/mpirun"
        wrapper.write_text(
            f'#!/bin/sh\nexport LD_LIBRARY_PATH={directory}/bin\nexec mpirun.mpich "$@"\n'
        )
        wrapper.chmod(0o755)
        library = next(Path("/usr/lib").glob("*/libmpich.so.12"))
        (directory / "bin/libmpi.so.12").symlink_to(library)
    script = directory / "job"
    text = argument.replace("$", "\\$")
    script.write_text(
        JOB.format(root=ROOT, directory=directory, bin=BIN, way=way, show=SHOW, argument=text)
    )
    job = cluster.submit(f"--output={directory}/output", script)
    fields = cluster.wait(job, timeout=240)
    assert fields["JobState"] == "COMPLETED", cluster.output(job)
    return [json.loads(path.read_text()) for path in (directory / "places").iterdir()]


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=pytest.mark.slow if way in SLOW else ()) for way in WAYS],
)
def test_four_ranks_on_two_nodes_know_their_places(
    way: str, cluster: Cluster, tmp_path: Path
) -> None:
    if shutil.which(NEEDS.get(way, "sh")) is None:
        pytest.fail(f"install {NEEDS[way]}")
    argument = ARGUMENT if way == "deepspeed over ssh" else ARGUMENT + EXPANDED
    places = _start(cluster, tmp_path, WAYS[way], argument)
    places.sort(key=lambda place: int(place["RANK"]))
    assert [place["RANK"] for place in places] == ["0", "1", "2", "3"]
    assert [place["LOCAL_RANK"] for place in places] == ["0", "1", "0", "1"]
    assert [place["host"] for place in places] == ["node1", "node1", "node2", "node2"]
    assert {place["WORLD_SIZE"] for place in places} == {"4"}
    assert len({place["MASTER_PORT"] for place in places}) == 1
    [address] = {place["MASTER_ADDR"] for place in places}
    assert address == "node1" or address.endswith(".11")
    for place in places:
        assert [word for word in place["arguments"] if "local_rank" not in word] == [argument]


def test_what_a_launcher_has_set_is_left_alone() -> None:
    environment = {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
    }
    before = dict(environment)
    adopt_launcher(environment)
    assert environment == before


@pytest.mark.parametrize("size", ["1", None])
def test_a_process_that_is_alone_stays_alone(size: str | None) -> None:
    environment = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16"}
    if size is not None:
        environment["SLURM_STEP_NUM_TASKS"] = size
    before = dict(environment)
    adopt_launcher(environment)
    assert environment == before


def test_an_address_that_is_given_needs_neither_mpi4py_nor_slurm() -> None:
    environment = {
        "OMPI_COMM_WORLD_RANK": "5",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu-01",
        "MASTER_PORT": "2000",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
    }
    adopt_launcher(environment)
    assert (environment["RANK"], environment["LOCAL_RANK"]) == ("5", "1")
    assert (environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == ("8", "gpu-01")


def test_without_scontrol_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    environment = {
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
    }
    with pytest.raises(ConfigError, match=r"n\[1-2\].*MASTER_ADDR"):
        adopt_launcher(environment)
