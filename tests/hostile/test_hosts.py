"""Names and numbers from launchers: treated as text, and refused where malformed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pretrain.distributed.launcher_env import adopt_launcher
from pretrain.distributed.rendezvous import World
from pretrain.errors import ConfigError
from tests.launchers.hostile import hostile_strings

ROOT = Path(__file__).resolve().parents[2]
STEP = {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
}
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a `scontrol` that notes its arguments and prints the file `nodes`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "scontrol"
    program.write_text(
        "#!/bin/sh\n"
        f"printf '%s\\n' \"$3\" >> {folder}/asked\n"
        f"cat {folder}/nodes 2> /dev/null || echo n1\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_hostile_lists_of_nodes_and_numbers_are_refused(scontrol: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    variables = ("SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID")
    for name in variables:
        for text in hostile_strings(canary):
            with pytest.raises(ConfigError, match=name):
                adopt_launcher({**STEP, name: text})
    assert not canary.exists()
    assert "touch" not in (scontrol / "asked").read_text(), "no hostile list reached a program"
    environment = dict(STEP)
    adopt_launcher(environment)
    assert environment["MASTER_ADDR"] == "n1"


@pytest.mark.parametrize("name", NUMBERS)
def test_hostile_ranks_are_refused_by_their_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in NUMBERS:
        monkeypatch.delenv(other, raising=False)
    for text in [*hostile_strings(tmp_path / "canary"), "-1", "1.0", "", " 1", "0x1", "\u00b2"]:
        monkeypatch.setenv(name, text)
        with pytest.raises(ConfigError, match=name):
            World.from_environment()
    monkeypatch.setenv(name, "1")
    assert 1 in World.from_environment()


def test_a_hostfile_holds_host_names_alone(scontrol: Path, tmp_path: Path) -> None:
    """DeepSpeed gives them to ssh, to which a name that begins with a dash is an option."""
    canary = tmp_path / "canary"
    environment = {**os.environ, "SLURM_JOB_NODELIST": "n[1-2]"}
    command = [str(ROOT / "launchers" / "hostfile.sh")]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, check=False
        )

    for text in [*hostile_strings(canary), "a b", "n1 slots=8", "n1;x", "-n1", "n1/../x", "\u0578"]:
        (scontrol / "nodes").write_text(f"{text}\n")
        done = run("8")
        assert done.returncode == 2, text
        assert all(
            " slots=8" not in line or line.startswith("x ") for line in done.stdout.splitlines()
        )
        if not text.isdecimal():
            assert run(text).returncode == 2
    (scontrol / "nodes").write_text("gpu-01\nn2.cluster_a\n")
    assert run("8").stdout == "gpu-01 slots=8\nn2.cluster_a slots=8\n"
    assert not canary.exists()
