"""Keys and passwords in the environment of a run: in no file, no output, no command line."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest

from pretrain.config import to_yaml
from tests.distributed import free_port, run_ranks
from tests.hostile.commands import Outcome, fault_of_refusal, train
from tests.pretrain.tiny_run import tiny_run, write_data

ROOT = Path(__file__).resolve().parents[2]
CANARIES = {
    "WANDB_API_KEY": "c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00",  # of the length that W&B takes
    "HF_TOKEN": "hf_CanaryCanaryCanaryCanaryCanary",
    "AWS_SECRET_ACCESS_KEY": "canary/secret/access/key/canary/canary",
    "AWS_ACCESS_KEY_ID": "AKIACANARYCANARYCANA",
    "MLFLOW_TRACKING_PASSWORD": "canary-mlflow-password",
    "GITHUB_TOKEN": "ghp_CanaryCanaryCanaryCanaryCanaryCana",
    "DATABASE_URL": "postgres://canary_user:canary_password@canary.host/db",
    "HTTPS_PROXY": "http://canary_proxy_user:canary_proxy_password@canary.proxy:3128",
}
LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", "PORT"],
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", "PORT"],
    "python": [sys.executable],
}


def _hits(data: bytes) -> list[str]:
    """Names of the canaries that are in `data`, as they are or in other usual forms."""
    return [
        name
        for name, value in CANARIES.items()
        if any(form in data for form in (value.encode(), value.encode().hex().encode()))
    ]


def _hits_below(folder: Path) -> dict[str, list[str]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 15, "there is something to search"
    found = {str(path): _hits(path.read_bytes()) for path in files}
    return {path: names for path, names in found.items() if names}


def _write_run(folder: Path, **changes: object) -> Path:
    write_data(folder)
    config = tiny_run(
        folder,
        logging__tensorboard=True,
        logging__wandb={"mode": "offline", "project": "p"},
        **changes,
    )
    (folder / "secret.yaml").write_text(to_yaml(config))
    return Path(config.run_dir)


def test_a_canary_that_is_written_is_found(tmp_path: Path) -> None:
    for number, value in enumerate(CANARIES.values()):
        (tmp_path / str(number)).write_text(f"x{value}x")
        for copy in range(3):
            (tmp_path / f"{number}-{copy}").touch()
    assert sorted(chain.from_iterable(_hits_below(tmp_path).values())) == sorted(CANARIES)


def _train_with_canaries(folder: Path) -> Outcome:
    os.environ.update(CANARIES)
    return train("--config-name", "secret", "--config-dir", str(folder))


def test_no_secret_of_the_environment_is_in_what_a_run_writes(tmp_path: Path) -> None:
    run_dir = _write_run(tmp_path)
    [outcome] = run_ranks(_train_with_canaries, 1, tmp_path, init=False)
    assert outcome.code == 0, outcome
    found = _hits_below(run_dir)
    print(f"{len(CANARIES)} canaries, {len(found)} files of the run with one")
    assert found == {}
    assert _hits((outcome.out + outcome.err).encode()) == []


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_no_secret_is_in_files_outputs_or_command_lines_of_a_job(
    launcher: str, fails: bool, tmp_path: Path
) -> None:
    """Also when it crashes, with every detail of where."""
    run_dir = _write_run(tmp_path, training__max_steps=20)
    port = str(free_port())
    command = [port if part == "PORT" else part for part in LAUNCHERS[launcher]]
    command += ["pretrain/train.py", "--config-name", "secret", "--config-dir", str(tmp_path)]
    command += ["training.lr=1e30"] * fails
    variables = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    variables |= {
        "MANYFORMER_DEBUG": "1",
        "OMP_NUM_THREADS": "1",
        "TORCH_SHOW_CPP_STACKTRACES": "1",
    }
    with (tmp_path / "output").open("wb") as output:
        job = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **variables, **CANARIES},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        lines = set()
        while job.poll() is None:
            lines |= _command_lines()
            time.sleep(0.02)
    assert (job.returncode != 0) == fails, (tmp_path / "output").read_text()
    assert any(b"pretrain/train.py" in line for line in lines), "the ranks were seen"
    found = {**_hits_below(tmp_path), **{str(line): _hits(line) for line in lines if _hits(line)}}
    print(f"{launcher}, fails {fails}: {len(lines)} command lines, {len(found)} hits")
    assert found == {}
    assert run_dir.is_dir()


def _command_lines() -> set[bytes]:
    """Of every process that this user sees."""
    lines = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.add(path.read_bytes())
        except OSError:
            continue  # it has ended
    return lines


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("logging.wandb.api_key=CANARY", "logging.wandb.api_key"),
        ("+aws_secret_access_key=CANARY", "aws_secret_access_key"),
        ("++hf_token=CANARY", "hf_token"),
        ("data.password=[CANARY", "data.password"),
        ("run_dir=s3://user:CANARY@host/run", "run_dir"),
        ("data.train=https://host/c?X-Amz-Signature=CANARY", "data.train"),
        ("data.train=[https://a/b,https://u:CANARY@host/c]", "data.train"),
        ("model.github_token=CANARY", "model.github_token"),
    ],
)
def test_a_credential_in_a_configuration_is_refused_and_not_shown(override: str, key: str) -> None:
    outcome = train("--config-name", "demo", override)
    assert fault_of_refusal(outcome, (key,)) is None, outcome
    assert "CANARY" not in outcome.err
    assert "environment" in outcome.err


def test_a_credential_in_a_run_file_is_refused_and_not_shown(tmp_path: Path) -> None:
    for line in (
        "wandb: {api_key: CANARY}",
        "url: postgres://u:CANARY@host/db",
        "x: [{token: CANARY}]",
    ):
        (tmp_path / "mine.yaml").write_text(f"defaults: [demo, _self_]\n{line}\n")
        outcome = train("--config-name", "mine", "--config-dir", str(tmp_path))
        assert fault_of_refusal(outcome) is None, outcome
        assert "CANARY" not in outcome.err
