"""The command line under every launcher: the same losses, and one line for a mistake."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from pretrain.config import to_yaml
from pretrain.errors import EXIT_COMPLETED
from pretrain.train import main
from tests.distributed import free_port, run_ranks
from tests.missing import cannot_run
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import metrics, tiny_run, write_data
from tests.tiers import tiered
from tests.tolerance import FP32_LOSS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "pretrain/train.py"


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> Path:
    """A directory of the user's own with a run file `tiny` and its corpus."""
    directory = tmp_path_factory.mktemp("launch")
    write_data(directory)
    (directory / "tiny.yaml").write_text(to_yaml(tiny_run(directory)))
    return directory


def _launch(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def _arguments(configs: Path, *overrides: str) -> list[str]:
    return [SCRIPT, "--config-name", "tiny", "--config-dir", str(configs), *overrides]


@pytest.fixture(scope="module")
def one_process(configs) -> list[float]:
    config = tiny_run(configs, run_dir=str(configs / "one"))
    assert run_ranks(run_training, 1, config, init=False) == [EXIT_COMPLETED]
    return [record["loss"] for record in metrics(config)[0]]


AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
LAUNCHERS = {
    "deepspeed, pipeline 2": (
        ["deepspeed", "--num_gpus", "2", "--master_port", "PORT"],
        ["--ds_config", "configs/ds/zero1.json", "parallel.pipeline=2"],
    ),
    "deepspeed, tensor 2": (
        ["deepspeed", "--num_gpus", "2", "--master_port", "PORT"],
        ["--ds_config", "configs/ds/zero1.json", "parallel.tensor=2"],
    ),
    "torchrun, data 2": (
        ["torchrun", "--nproc_per_node", "2", "--master_port", "PORT"],
        ["training.batch_size=2", "--ds_config", "configs/ds/zero2.json"],
    ),
    "local script, data 2": (["launchers/local.sh", "2"], ["training.batch_size=2"]),
    "mpirun, data 2": (
        ["mpirun", "--oversubscribe", "-n", "2", sys.executable],
        ["training.batch_size=2"],
    ),
    "accelerate, sequence parallel": (
        [
            *("accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
            *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "PORT"),
        ],
        ["parallel.tensor=2", "parallel.sequence_parallel=true"],
    ),
}


# Ranks find their places under Open MPI, too: tests/launchers/test_launch_ways.py.
@pytest.mark.parametrize("launcher", tiered(LAUNCHERS, ["deepspeed, pipeline 2"]))
def test_every_launcher_trains_to_the_losses_of_one_process(
    launcher, configs, one_process, tmp_path
):
    command, overrides = LAUNCHERS[launcher]
    if command[0] == "mpirun" and shutil.which("mpirun") is None:
        cannot_run("no mpirun here", needs="Open MPI")
    command = [str(free_port()) if word == "PORT" else word for word in command]
    config = tiny_run(configs, run_dir=str(tmp_path / "run"))
    arguments = _arguments(configs, f"run_dir={config.run_dir}", *overrides)
    if command[0] == "launchers/local.sh":
        arguments.remove(SCRIPT)
    done = _launch(*command, *arguments, **AS_ROOT, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert [r["loss"] for r in metrics(config)[0]] == pytest.approx(one_process, rel=FP32_LOSS)


class Said(NamedTuple):
    code: int
    stderr: str


def _main(arguments: list[str], **variables: str) -> Said:
    """The command in this process, a rank."""
    os.environ.update(variables)
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = main(arguments[1:])
    return Said(code, stderr.getvalue())


_MISTAKES = pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=nowhere", "nowhere.idx: no such file"),
        ("training.lr_multipliers={router: 2.0}", "no parameter name contains 'router'"),
    ],
)


def _assert_said_once(message: str, stderr: str) -> None:
    said = [line for line in stderr.splitlines() if line.startswith("error")]
    assert len(said) == 1, stderr
    assert message in said[0]
    assert "Traceback" not in stderr


@_MISTAKES
def test_a_mistake_is_said_once_for_all_ranks_in_one_line(override, message, configs, tmp_path):
    arguments = _arguments(configs, f"run_dir={tmp_path}/run", "parallel.tensor=2", override)
    ranks = run_ranks(_main, 2, arguments, init=False)
    assert [rank.code for rank in ranks] == [2, 2]
    _assert_said_once(message, "".join(rank.stderr for rank in ranks))


@pytest.mark.slow
@_MISTAKES
def test_under_the_launcher_too(override, message, configs, tmp_path):
    arguments = _arguments(configs, f"run_dir={tmp_path}/run", override)
    done = _launch("deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), *arguments)
    assert done.returncode != 0
    _assert_said_once(message, done.stderr)


def test_a_port_in_use_is_named_with_the_remedy(configs):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = _arguments(configs, "parallel.tensor=2")
        variables = {"WORLD_SIZE": "2", "MASTER_PORT": str(port)}
        (rank,) = run_ranks(_main, 1, arguments, init=False, **variables)
    assert rank.code == 2
    assert f"127.0.0.1:{port}" in rank.stderr
    assert "choose a free port" in rank.stderr


def test_a_loss_that_is_not_finite_ends_the_run_with_its_own_code(configs, tmp_path):
    changes = ("training.lr=1e30", "stability.max_skipped_steps=0")
    arguments = _arguments(configs, f"run_dir={tmp_path}/run", *changes)
    (rank,) = run_ranks(_main, 1, arguments, init=False)
    assert rank.code == 5
    assert "error: step" in rank.stderr
