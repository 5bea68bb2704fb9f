"""The published command lines, as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from models.daria_former.cli import generate, train
from tests.models.daria_former.shrunk import shrunk

ROOT = Path(__file__).parents[3]


def _call(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, "-m", "models.daria_former.cli", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("daria")
    (folder / "text.txt").write_text("One word after another, and so on. " * 400)
    (folder / "model.yaml").write_text(yaml.safe_dump(shrunk(lora_rank=2).to_dict()))
    return folder


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    options = ["--train_data", folder / "text.txt", "--eval_data", folder / "text.txt"]
    options += ["--config", folder / "model.yaml", "--save_dir", folder / "run", "--seq_len", 64]
    options += ["--batch_size", 2, "--warmup_steps", 1, "--save_every", 2, "--eval_every", 2]
    options += ["--lr", 1e-3, "--log_every", 1, "--no_amp"]
    done = _call("train", *options, "--max_steps", 2)
    assert done.returncode == 0, done.stderr
    more = _call("train", *options, "--max_steps", 3, "--resume", folder / "run")
    assert more.returncode == 0, more.stderr
    return folder / "run"


def test_training_goes_on_where_it_was(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert any("eval_loss" in line for line in lines)


def test_text_is_generated(trained):
    done = _call("generate", "--checkpoint", trained, "--prompt", "One word", "--max_new_tokens", 9)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("One word")


def test_an_export_with_merged_adapters_has_none(trained, folder):
    done = _call("export", "--checkpoint", trained, "--output", folder / "hf", "--merge_lora")
    assert done.returncode == 0, done.stderr
    config = json.loads((folder / "hf" / "config.json").read_text())
    assert config["family_config"]["lora_rank"] == 0
    assert (folder / "hf" / "modeling_daria_former.py").is_file()


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (train, ["--train_data", "x.txt", "--config", "tiny"], "none of small, base"),
        (train, ["--train_data", "x.txt", "--wandb_project", "p"], "no effect without --wandb"),
        (train, ["--train_data", "x.txt", "--resume", "elsewhere"], "its own directory"),
        (train, ["--train_data", "x.txt", "--tokenizer", "/nowhere/t.json"], "--tokenizer"),
        (generate, ["--checkpoint", "/nowhere", "--prompt", "a"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line(command, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert command(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
