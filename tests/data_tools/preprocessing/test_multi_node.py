from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from data_tools.errors import DataError
from data_tools.preprocess import main
from data_tools.preprocessing import multi_node
from data_tools.preprocessing.multi_node import FolderCommunicator, SingleRank, find_communicator
from tests.refusals import assert_refused

needs_mpi = pytest.mark.skipif(
    shutil.which("mpirun") is None or find_spec("mpi4py") is None,
    reason="needs mpirun and mpi4py",
)


def _corpus(path: Path) -> list[str]:
    text = "".join(json.dumps({"text": f"document {i} " * (i % 9)}) + "\n" for i in range(60_000))
    path.write_text(text)
    shards = ["--shard-megabytes", "1"]  # of about 6 MB
    return ["--input", str(path), "--tokenizer", "bytes", "--workers", "1", *shards, "--output"]


def _mpirun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["mpirun", "-n", "3", "--oversubscribe", "--bind-to", "none", sys.executable]
    allow = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.run(
        [*command, "-m", "data_tools.preprocess", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **allow},
    )


def _srun(job: str, *arguments: str, size: int = 3) -> list[subprocess.Popen[str]]:
    """Processes with the environment that srun gives them."""
    command = [sys.executable, "-m", "data_tools.preprocess", *arguments]
    slurm = {"SLURM_STEP_NUM_TASKS": str(size), "SLURM_JOB_ID": job, "SLURM_STEP_ID": "0"}
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **slurm, "SLURM_PROCID": str(rank)},
        )
        for rank in range(size)
    ]


def _assert_same_files(folder: Path, ours: str, theirs: str) -> None:
    for suffix in (".bin", ".idx"):
        contents = [(folder / f"{name}{suffix}").read_bytes() for name in (ours, theirs)]
        assert contents[0] == contents[1]


@needs_mpi
def test_ranks_of_mpirun_write_what_one_process_writes(tmp_path: Path) -> None:
    arguments = [*_corpus(tmp_path / "in.jsonl")]
    main([*arguments, str(tmp_path / "one")])
    done = _mpirun(*arguments, str(tmp_path / "many"))
    assert done.returncode == 0, done.stderr
    _assert_same_files(tmp_path, "one", "many")
    assert not (tmp_path / "many.work").exists()
    again = _mpirun(*arguments, str(tmp_path / "many"))
    assert again.returncode != 0
    assert "many.bin exists; choose another output" in again.stderr


def test_ranks_of_srun_write_what_one_process_writes(tmp_path: Path) -> None:
    arguments = [*_corpus(tmp_path / "in.jsonl")]
    main([*arguments, str(tmp_path / "one")])
    processes = _srun("1", *arguments, str(tmp_path / "many"))
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert [bool(out) for out, _ in outputs] == [True, False, False]  # rank 0 reports
    _assert_same_files(tmp_path, "one", "many")
    assert not (tmp_path / "many.work").exists()


def test_error_of_one_rank_stops_all_and_publishes_nothing(tmp_path: Path) -> None:
    arguments = [*_corpus(tmp_path / "in.jsonl"), str(tmp_path / "out")]
    with open(tmp_path / "in.jsonl", "a") as file:
        file.write("bad\n")
    processes = _srun("1", *arguments)
    outputs = [process.communicate() for process in processes]
    assert processes[0].returncode == 2
    assert "in.jsonl:60001: not valid JSON" in outputs[0][1]
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.work"]


def test_input_that_is_missing_leaves_nothing(tmp_path: Path) -> None:
    arguments = ["--input", str(tmp_path / "absent.jsonl"), "--tokenizer", "bytes"]
    processes = _srun("1", *arguments, "--output", str(tmp_path / "out"))
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [2, 2, 2], outputs
    assert "absent.jsonl: no such file, or nothing in it" in outputs[0][1]
    assert os.listdir(tmp_path) == []


def test_texts_of_all_ranks_are_gathered_in_order(tmp_path: Path) -> None:
    def meet(rank: int) -> tuple[list[str], list[str]]:
        ours = FolderCommunicator(tmp_path / "meeting", rank=rank, size=3)
        everywhere = ours.gather("a", f"rank {rank}", last=False)
        return everywhere, ours.gather("b", "x" * rank, last=True)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(meet, range(3)))
    assert [first for first, _ in results] == [["rank 0", "rank 1", "rank 2"]] * 3
    assert [second for _, second in results] == [["", "x", "xx"], ["x"], ["xx"]]
    assert not (tmp_path / "meeting").exists()


def test_rank_without_heartbeats_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multi_node, "_HEARTBEAT_TIMEOUT_SECONDS", 0.3)
    with assert_refused(
        "rank", value=1, constraint=("of 2", "heartbeat"), remedy=("log", "again"), error=DataError
    ):
        FolderCommunicator(tmp_path / "meeting", rank=0, size=2).gather("a", "", last=False)


def test_launcher_is_detected_from_the_environment(tmp_path: Path) -> None:
    batch_step = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}
    for environment in ({}, batch_step, {"OMPI_COMM_WORLD_SIZE": "1"}):
        assert isinstance(find_communicator(tmp_path.joinpath, environment), SingleRank)
    step = {**batch_step, "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_ID": "7"}
    found = find_communicator(tmp_path.joinpath, step)
    assert isinstance(found, FolderCommunicator)
    assert (found.rank, found.size) == (2, 4)
    assert os.listdir(tmp_path) == ["1-7-0"]
