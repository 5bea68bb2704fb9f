"""Every published command, with smaller numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.agiformer.standalone import cli

TEXT = ("In the beginning there was a byte, and the byte was followed by another. " * 30).encode()
SMALL = [
    "--d_model", "32", "--n_layers", "1", "--num_heads", "2", "--seq_len", "64", "--max_steps", "6",
    "--eval_every", "3", "--warmup", "1", "--batch_size", "2", "--accumulation", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name in ("train", "dictionary", "stories", "wiki", "val"):
        (folder / f"{name}.txt").write_bytes(TEXT)
    return folder


@pytest.fixture(scope="module")
def scaled(texts) -> Path:
    folder = texts / "scaled"
    assert cli.train_scaled(["--data_dir", str(texts), "--output", str(folder), *SMALL]) == 0
    return folder


def test_scaled_training_leaves_the_published_files(scaled):
    names = {path.name for path in scaled.iterdir()}
    assert names == {
        "best_model_scaled.pth", "last_model_scaled.pth", "metrics_scaled.json",
        "checkpoint_step_3.pth", "checkpoint_step_6.pth",
    }  # fmt: skip
    metrics = json.loads((scaled / "metrics_scaled.json").read_text())
    assert metrics.keys() == {"steps", "train_bpc", "val_bpc", "lr"}
    assert metrics["steps"] == [3, 6]
    assert 8.1 > metrics["val_bpc"][0] > metrics["val_bpc"][1] > 0


def test_curriculum_training_records_and_stores_the_plasticity(texts):
    folder = texts / "curriculum"
    assert cli.train_curriculum(["--data_dir", str(texts), "--output", str(folder), *SMALL]) == 0
    metrics = json.loads((folder / "metrics_curriculum.json").read_text())
    assert metrics.keys() == {"steps", "train_bpc", "val_bpc", "lr", "plasticity"}
    assert metrics["plasticity"] == [0.5, 0.99]
    stored = torch.load(folder / "last_model_curriculum.pth", weights_only=True)["state_dict"]
    assert stored["block_0.memory.plasticity"].tolist() == pytest.approx([0.99])
    assert (folder / "best_model_curriculum.pth").is_file()


@pytest.mark.parametrize("form", [[], ["--model"]])
def test_generation_takes_the_file_in_both_places_and_a_prompt_of_any_length(form, scaled, capsys):
    file = str(scaled / "best_model_scaled.pth")
    for prompt in ("a", "abcdefg"):
        assert cli.generate([*form, file, "--prompt", prompt, "--length", "9", "--temp", "0"]) == 0
        assert capsys.readouterr().out.startswith(prompt)


def test_recall_is_measured_beyond_the_attention_with_the_memory_and_without(scaled, capsys):
    file = str(scaled / "best_model_scaled.pth")
    assert cli.recall_test([file, "--distances", "100", "3000"]) == 0
    reach, *records = capsys.readouterr().out.splitlines()
    assert reach == "attention reaches 1024 bytes back"
    near, far = map(json.loads, records)
    assert (near["within_attention"], far["within_attention"]) == (True, False)
    assert near["memory_on"] != near["memory_off"]


def test_thinking_steps_of_a_text_are_counted(scaled, capsys):
    assert cli.inspect_reasoning(["--model", str(scaled / "last_model_scaled.pth")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[0])
    assert 1 <= found["mean_steps"] <= found["most_steps"] == 3


def test_what_is_missing_is_named_in_one_line(texts, capsys, tmp_path):
    for command, arguments, message in (
        (cli.train_scaled, ["--data_dir", str(tmp_path)], "train.txt is missing"),
        (cli.generate, [], "give the file once"),
        (cli.generate, ["a.pth", "--model", "b.pth"], "give the file once"),
        (cli.generate, ["absent.pth"], "absent.pth is no file"),
        (cli.train_scaled, ["--steps", "3"], "--help lists the options"),
    ):
        assert command(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    "name",
    ["train_scaled", "train_curriculum", "generate", "test_recall_fixed", "inspect_reasoning"],
)
def test_every_command_is_a_module(name):
    line = [sys.executable, "-m", f"models.agiformer.{name}", "--help"]
    found = subprocess.run(line, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("usage: ")


@pytest.mark.slow
def test_the_pattern_is_learned_in_200_steps(capsys):
    assert cli.overfit_test([]) == 0
    assert capsys.readouterr().out.endswith("SUCCESS\n")
