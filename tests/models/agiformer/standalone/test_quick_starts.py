"""Every published command, with smaller numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.agiformer.memory.forms import chunked_memory
from models.agiformer.standalone import cli
from models.agiformer.standalone.model import load_model, save_model

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
    options = ["--data_dir", str(texts), "--output", str(folder), *SMALL, "--eval_every", "4"]
    assert cli.train_scaled(options) == 0
    return folder


def test_scaled_training_leaves_the_published_files(scaled):
    """The end of training is evaluated as well, where it lies between two evaluations."""
    names = {path.name for path in scaled.iterdir()}
    assert names == {
        "best_model_scaled.pth", "last_model_scaled.pth", "metrics_scaled.json",
        "checkpoint_step_4.pth", "checkpoint_step_6.pth",
    }  # fmt: skip
    metrics = json.loads((scaled / "metrics_scaled.json").read_text())
    assert metrics.keys() == {"steps", "train_bpc", "val_bpc", "lr"}
    assert metrics["steps"] == [4, 6]
    assert 8.1 > metrics["val_bpc"][0] > metrics["val_bpc"][1] > 0


def test_curriculum_training_records_and_stores_the_plasticity(texts, capsys):
    folder = texts / "curriculum"
    assert cli.train_curriculum(["--data_dir", str(texts), "--output", str(folder), *SMALL]) == 0
    metrics = json.loads((folder / "metrics_curriculum.json").read_text())
    assert metrics.keys() == {"steps", "train_bpc", "val_bpc", "lr", "plasticity"}
    assert metrics["plasticity"] == [0.5, 0.99]
    lines = capsys.readouterr().out.splitlines()
    printed = [json.loads(line)["val_bpc"] for line in lines if "val_bpc" in line]
    assert printed == pytest.approx(metrics["val_bpc"], abs=1e-6)
    # Evaluated every 200 steps: a model of each would be a hundred.
    assert not list(folder.glob("checkpoint_step_*"))
    stored = torch.load(folder / "last_model_curriculum.pth", weights_only=True)["state_dict"]
    assert stored["block_0.memory.plasticity"].tolist() == pytest.approx([0.99])
    assert (folder / "best_model_curriculum.pth").is_file()


@pytest.mark.parametrize("form", [[], ["--model"]])
def test_generation_takes_the_file_in_both_places_and_a_prompt_of_any_length(form, scaled, capsys):
    file = str(scaled / "best_model_scaled.pth")
    for prompt in ("a", "abcdefg"):
        assert cli.generate([*form, file, "--prompt", prompt, "--length", "9", "--temp", "0"]) == 0
        assert capsys.readouterr().out.startswith(prompt)


def test_a_prompt_may_end_in_half_a_character(scaled, capsys):
    file, prompt = str(scaled / "best_model_scaled.pth"), os.fsdecode("Tü".encode()[:2])
    assert cli.generate([file, "--prompt", prompt, "--length", "1", "--temp", "0"]) == 0
    assert capsys.readouterr().out.startswith("T\N{REPLACEMENT CHARACTER}")


def test_the_quick_start_without_a_file_reads_the_best_model_of_the_folder(
    scaled, capsys, monkeypatch
):
    monkeypatch.chdir(scaled)
    assert cli.recall_test([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4  # distances of its own


def test_recall_is_measured_beyond_the_attention_with_the_memory_and_without(scaled, capsys):
    file = str(scaled / "best_model_scaled.pth")
    assert cli.recall_test([file, "--distances", "100", "3000"]) == 0
    reach, *records = capsys.readouterr().out.splitlines()
    assert reach == "attention reaches 1024 bytes back"
    near, far = map(json.loads, records)
    assert (near["within_attention"], far["within_attention"]) == (True, False)
    assert near["memory_on"] != near["memory_off"]


def test_thinking_steps_of_a_text_are_counted_and_a_collapse_is_told(scaled, tmp_path, capsys):
    def inspected(file: Path) -> list[str]:
        assert cli.inspect_reasoning(["--model", str(file)]) == 0
        return capsys.readouterr().out.splitlines()

    collapsed, model = tmp_path / "collapsed.pth", load_model(scaled / "last_model_scaled.pth")
    model.body.reasoning.halt_bias.data.fill_(9.0)
    save_model(model, collapsed)
    record, told = inspected(collapsed)
    assert json.loads(record)["mean_steps"] == pytest.approx(1.0)
    assert "collapsed: every patch takes about 1.00 steps" in told
    model.body.reasoning.halt_bias.data.fill_(0.0)
    model.body.reasoning.halt.data.normal_(std=5.0, generator=torch.Generator().manual_seed(0))
    save_model(model, collapsed)
    (record,) = inspected(collapsed)
    by_steps = json.loads(record)["patches_by_steps"]
    assert list(by_steps) == ["1", "2", "3"]
    assert sum(by_steps.values()) == 15  # of 57 bytes
    assert sum(int(n) * count for n, count in by_steps.items()) / 15 == pytest.approx(
        json.loads(record)["mean_steps"]
    )
    assert 1.05 < json.loads(record)["mean_steps"] < json.loads(record)["most_steps"] == 3


def test_the_memories_of_a_model_are_checked(scaled, capsys, monkeypatch):
    file = str(scaled / "last_model_scaled.pth")
    assert cli.memory_integrity([file]) == 0
    *checks, verdict = capsys.readouterr().out.splitlines()
    assert verdict == "SUCCESS"
    assert len(checks) == 2 * 4 + 1  # of one block at four plasticities, and of a stream
    assert all(json.loads(check)["passed"] for check in checks)

    def without_decay(inputs, *rest, **options):
        return chunked_memory(inputs._replace(log_decay=0 * inputs.log_decay), *rest, **options)

    monkeypatch.setattr("models.agiformer.block.chunked_memory", without_decay)
    assert cli.memory_integrity([file, "--prompt", "a" * 400]) == 1
    *checks, verdict = capsys.readouterr().out.splitlines()
    assert verdict.startswith("FAILURE")
    failed = [json.loads(check)["check"] for check in checks if not json.loads(check)["passed"]]
    # The recurrence of single bytes still forgets, so a stream differs, too.
    assert failed[0] == "block 0, plasticity 1: reads what the recurrence reads"
    assert failed[-1] == "a streamed text, all logits"


def test_what_is_missing_or_cannot_be_is_named_in_one_line(texts, scaled, capsys, tmp_path):
    file, data = str(scaled / "best_model_scaled.pth"), ["--data_dir", str(texts)]
    for command, arguments, message in (
        (cli.train_scaled, [*data, *SMALL, "--seq_len", "66"], "=66 must be a multiple of the 4 "),
        (cli.train_scaled, [*data, "--seq_len", "0"], "seq_len=0 must be 1 or more; raise it"),
        (cli.train_curriculum, [*data, "--batch_size", "0"], "batch_size=0 must be 1 or more; "),
        (cli.train_curriculum, [*data, "--max_steps", "0"], "max_steps=0 must be 1 or more"),
        (
            cli.train_scaled,
            [*data, "--thinking_steps", "0"],
            "thinking_steps=0 must be greater than 0; change thinking_steps",
        ),
        (cli.train_scaled, [*data, "--window_size", "0"], "window_size=0 must be greater than 0; "),
        (cli.inspect_reasoning, [file, "--prompt", ""], "--prompt is empty; give"),
        (cli.memory_integrity, [file, "--device", "tpu"], "--device tpu cannot be used"),
        (
            cli.recall_test,
            [file, "--distances", "9"],
            "less than the 21 bytes of the question; use",
        ),
        (cli.overfit_test, ["--steps", "0"], "--steps=0 must be 1 or more; raise it"),
        (cli.generate, [file, "--length", "0"], "--length=0 must be 1 or more; raise it"),
        (cli.train_scaled, [*data, *SMALL, "--output", file], f"--output={file} is no folder; "),
        (cli.train_scaled, ["--data_dir", str(tmp_path)], "train.txt is missing"),
        (cli.train_scaled, [*data, *SMALL, "--seed", str(2**64)], f"--seed {2**64} must be from"),
        (cli.train_scaled, [*data, *SMALL, "--d_model", "33"], "d_model=33 is not a multiple of"),
        (cli.train_scaled, [*data, *SMALL, "--accumulation", "0"], "--accumulation=0 must be"),
        (cli.generate, [file, "--temp", "-1"], "temperature=-1.0 must be finite"),
        (cli.generate, [], "best_model_scaled.pth is no file"),
        (cli.generate, ["a.pth", "--model", "b.pth"], "give the file once"),
        (cli.generate, ["absent.pth"], "absent.pth is no file"),
        (cli.train_scaled, ["--steps", "3"], "--help lists the options"),
    ):
        assert command(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


MODULES = (
    "train_scaled",
    "train_curriculum",
    "generate",
    "overfit_test",
    "test_recall_fixed",
    "test_memory_integrity",
    "inspect_reasoning",
)


def test_every_command_is_a_module_and_helps_and_refuses_without_torch(tmp_path):
    """All of them in one new process, and in a folder without texts and models."""
    code = """
import runpy, sys
for name in sys.argv[1:]:
    wrong = ["--steps", "0"] if name == "overfit_test" else []
    for arguments, code in ((["--help"], 0), (wrong, 2)):
        sys.argv = [name, *arguments]
        try:
            runpy.run_module(f"models.agiformer.{name}", run_name="__main__")
        except SystemExit as end:
            assert end.code == code, (name, arguments, end.code)
assert "torch" not in sys.modules
"""
    line = [sys.executable, "-c", code, *MODULES]
    found = subprocess.run(line, capture_output=True, text=True, check=True, cwd=tmp_path)
    for name in MODULES:
        assert f"usage: {name} " in found.stdout


@pytest.mark.slow
def test_the_pattern_is_learned_in_200_steps(capsys):
    assert cli.overfit_test([]) == 0
    assert capsys.readouterr().out.endswith("SUCCESS\n")
