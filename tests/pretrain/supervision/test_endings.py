"""Every end of a run under a launcher: one line, a known exit code, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.errors import EXIT_LOST_RANK
from tests.distributed import free_port
from tests.missing import cannot_run
from tests.pretrain.tiny_run import metrics, tiny_run, write_endless_run
from tests.tiers import tiered

ROOT = Path(__file__).resolve().parents[3]
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "PORT"],
    "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", "PORT"],
    "local.sh": [str(ROOT / "launchers/local.sh"), "2"],
    "mpirun": ["mpirun", "--oversubscribe", "-n", "2", sys.executable],
}
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK")
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
SCRIPT = "pretrain/train.py"
# What the command returns when a rank was killed, and when the ranks were stopped and have saved.
# DeepSpeed returns the code of the rank that it first sees to have ended, the killed or another.
CODES = {
    "deepspeed": ((247, EXIT_LOST_RANK), 75),
    "torchrun": ((1,), 1),
    "local.sh": ((1,), 1),
    "mpirun": ((137,), 75),
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the run file `tiny`, of steps without end, and its corpus."""
    directory = tmp_path_factory.mktemp("endings")
    write_endless_run(directory)
    return directory


class Job:
    """A run of two ranks under a launcher."""

    def __init__(self, launcher: str, configs: Path, folder: Path) -> None:
        if launcher == "mpirun" and shutil.which("mpirun") is None:
            cannot_run("no mpirun here", needs="Open MPI")
        self.run_dir = folder / "run"
        self._log = (folder / "log").open("w+")
        self.port = free_port()
        command = [str(self.port) if word == "PORT" else word for word in LAUNCHERS[launcher]]
        command += [] if launcher == "local.sh" else [SCRIPT]
        command += ["--config-name", "tiny", "--config-dir", str(configs)]
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        variables = {"PATH": path, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **AS_ROOT}
        self.command = subprocess.Popen(
            [*command, f"run_dir={self.run_dir}"],
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    @property
    def log(self) -> str:
        self._log.flush()
        return Path(self._log.name).read_text()

    def processes(self) -> dict[int, str]:
        """Every process of this job that runs: its run directory is on all their command lines."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if str(self.run_dir).encode() in line and state != "Z":
                    found[int(entry.name)] = line.replace(b"\0", b" ").decode()
        return found

    def rank(self, number: int) -> int:
        """The process of a rank."""
        for pid in self.processes():
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if any(f"{name}={number}".encode() in variables for name in RANK_VARIABLES):
                    return pid
        raise AssertionError(f"no process of rank {number}: {self.log}")

    def wait_for_step(self, number: int) -> None:
        path = self.run_dir / "metrics.jsonl"
        deadline = time.monotonic() + 240  # beside other work, imports alone took a minute
        while not (path.exists() and path.read_text().count('"loss"') >= number):
            assert self.command.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def gone_after(self, limit: float) -> float:
        """Seconds until the last process is gone.

        Raises:
            AssertionError: there is one after `limit` seconds.
        """
        began = time.monotonic()
        while (self.command.poll() is None) or self.processes():
            waited = time.monotonic() - began
            assert waited < limit, f"after {waited:.1f} s: {self.processes()}\n{self.log}"
            time.sleep(0.02)
        return time.monotonic() - began

    def kill(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.command.wait()
        self._log.close()


@contextlib.contextmanager
def job(launcher: str, configs: Path, folder: Path) -> Iterator[Job]:
    folder.mkdir(exist_ok=True)
    started = Job(launcher, configs, folder)
    try:
        yield started
    finally:
        started.kill()


def _is_held(port: int) -> bool:
    """Whether a process listens; a client of another test may have got the number by now."""
    listens = "0A"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == listens and int(local.rpartition(":")[2], 16) == port:
                return True
    return False


@pytest.mark.parametrize("launcher", tiered(LAUNCHERS, ["deepspeed"]))
def test_a_killed_rank_ends_the_job_and_is_named(launcher, configs, tmp_path):
    with job(launcher, configs, tmp_path) as run:
        run.wait_for_step(3)
        os.kill(run.rank(1), signal.SIGKILL)
        waited = run.gone_after(10)
        print(f"{launcher}: all processes gone {waited:.1f} s after the kill of a rank")
        assert run.command.returncode in CODES[launcher][0]
        assert not _is_held(run.port)
        said = re.findall(r"^error on rank 0: (.*)$|^error: (.*)$", run.log, re.MULTILINE)
        assert len(said) == 1, run.log
        assert re.search(
            r"rank 1 \(process \d+ on .*last heard of in .*\) has ended .*signal 9, likely out of",
            "".join(said[0]),
        )


# That a signal to a job of Slurm saves and ends it: tests/launchers/test_requeue.py.
@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_signal_to_the_launcher_leaves_nothing_behind(number, launcher, configs, tmp_path):
    with job(launcher, configs, tmp_path) as run:
        run.wait_for_step(3)
        os.kill(run.command.pid, number)
        waited = run.gone_after(10)
        print(f"{launcher}, {number.name}: all processes gone after {waited:.1f} s")
        assert run.command.returncode != 0
        assert not _is_held(run.port)
        if number != signal.SIGKILL or launcher in ("deepspeed", "mpirun"):
            [saved] = [path.name for path in (run.run_dir / "checkpoints").glob("step_*")]
            [*_, last], _ = metrics(tiny_run(configs, run_dir=str(run.run_dir)))
            assert saved == f"step_{last['step']}"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_to_one_rank_stops_all_with_a_save_and_the_code_of_the_command(
    launcher, configs, tmp_path
):
    with job(launcher, configs, tmp_path) as run:
        run.wait_for_step(3)
        os.kill(run.rank(1), signal.SIGUSR1)
        run.gone_after(10)
        assert run.command.returncode == CODES[launcher][1]
        assert run.log.count("stopped at step") == 1
        assert not re.search("^error", run.log, re.MULTILINE), run.log


@pytest.mark.slow
def test_a_run_is_back_after_the_death_of_a_rank_in_little_more_than_a_start(configs, tmp_path):
    """From the kill to the first new step, in a loop as a scheduler would."""
    began = time.monotonic()
    with job("deepspeed", configs, tmp_path / "first") as run:
        run.wait_for_step(1)
        start = time.monotonic() - began
        run.wait_for_step(3)
        began = time.monotonic()
        os.kill(run.rank(1), signal.SIGKILL)
        run.gone_after(10)
    with job("deepspeed", configs, tmp_path / "second") as run:
        run.wait_for_step(1)
        waited = time.monotonic() - began
    print(f"deepspeed: start {start:.1f} s; kill of a rank to first new step {waited:.1f} s")
    assert waited < 10 + 2 * start


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_20_kills_at_random_moments_leave_nothing_behind(seed, configs, tmp_path):
    generator = random.Random(seed)
    launcher, rank = generator.choice(sorted(LAUNCHERS)), generator.randrange(2)
    with job(launcher, configs, tmp_path) as run:
        run.wait_for_step(1)
        time.sleep(generator.uniform(0, 1))
        os.kill(run.rank(rank), signal.SIGKILL)
        waited = run.gone_after(10)
        print(f"{launcher}, rank {rank}: all processes gone after {waited:.1f} s")
        assert run.command.returncode not in (0, None)
        assert not _is_held(run.port)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_launcher_that_ends_while_the_run_starts_leaves_nothing_behind(seed, configs, tmp_path):
    generator = random.Random(seed)
    launcher = ("deepspeed", "torchrun")[seed % 2]
    number = generator.choice([signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
    with job(launcher, configs, tmp_path) as run:
        delay = generator.uniform(0.1, 8)
        time.sleep(delay)
        os.kill(run.command.pid, number)
        waited = run.gone_after(20)
        print(f"{launcher}, {number.name} after {delay:.1f} s: all gone after {waited:.1f} s")
        assert run.command.returncode != 0
