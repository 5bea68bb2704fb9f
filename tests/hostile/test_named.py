"""Inputs that are known to break others, one by one: names that lead out, bombs, exit codes."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, cast

import pytest
import yaml
import zstandard

from models.hf.import_weights import INDEX_NAME, open_foreign_weights
from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.manifest import encode_manifest, read_manifest
from pretrain.config import to_yaml
from tests.hostile.commands import Outcome, fault_of_refusal, tool, train
from tests.hostile.settings import REFERENCES
from tests.models.checkpoints import config, write_checkpoint
from tests.pretrain.checkpointing.fixtures import assert_holds, contents, open_store
from tests.pretrain.tiny_run import tiny_run

ROOT = Path(__file__).resolve().parents[2]
LEADING_OUT = [
    *("..", ".", "../x", "../../etc/passwd", "a/../../x", "/etc/passwd", "//etc/passwd", "~/x"),
    *("weights/../../x", "./x", "a//b", "a/", "/", "", " ", "..\\x", "C:\\x", "a\\..\\..\\x"),
    *("x\0y", "x\ny", "x\u2028y", "\u2025/x", "%2e%2e/x", "..%2fx", "file:///etc/passwd"),
    *("-rf", "a" * 200, "a/b/c/d/e/f", ".hidden", "con|x", "$(x)", "`x`", "x;y", "*"),
]


def test_names_that_lead_out_of_a_checkpoint_are_refused(tmp_path: Path) -> None:
    step = tmp_path / "step_0"
    write_checkpoint(step, config())
    content = json.loads((step / "manifest.json").read_bytes())
    del content["checksum"]
    for name in LEADING_OUT:
        entry = {"size": 0, "sha256": "0" * 64, "rank": 0}
        forged = {**content, "files": {**content["files"], name: entry}}
        (step / "manifest.json").write_bytes(encode_manifest(forged))
        with pytest.raises(CheckpointError, match=r"manifest\.json.*files"):
            read_manifest(step)


def test_names_that_lead_out_of_a_model_are_refused(tmp_path: Path) -> None:
    for name in LEADING_OUT:
        (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(ValueError, match=INDEX_NAME), open_foreign_weights(tmp_path):
            pass


def test_what_latest_says_leads_nowhere(tmp_path: Path) -> None:
    """It is a hint: the directories are what counts."""
    store = open_store(tmp_path / "run")
    store.save(contents(3))
    latest = tmp_path / "run" / "checkpoints" / "latest"
    for name in LEADING_OUT:
        latest.write_text(name)
        assert_holds(store.find("auto"), 3)
    store.close()


def _print_run_dir(folder: Path, name: str) -> Outcome:
    (folder / "mine.yaml").write_text(to_yaml(tiny_run(folder, run_dir=name)))
    return train("--config-name", "mine", "--config-dir", str(folder), "--print-run-dir")


def test_a_run_directory_may_have_any_name(tmp_path: Path) -> None:
    for name in (
        "a b",
        "'q'",
        '"q"',
        "a\nb",
        "\u00e9\u65e5",
        "-leading",
        "$(x)",
        "a;b",
        "{x}",
        "%n",
    ):
        outcome = _print_run_dir(tmp_path, f"/runs/{name}")
        assert (outcome.code, outcome.out) == (0, f"/runs/{name}\n"), outcome


def test_references_of_references_are_counted_before_they_are_followed(tmp_path: Path) -> None:
    """In the run file and in a file of a group; ten to the power of eight values in 500 bytes."""
    (tmp_path / "bomb.yaml").write_text(REFERENCES)
    begin = time.monotonic()
    outcome = train("--config-name", "bomb", "--config-dir", str(tmp_path))
    assert fault_of_refusal(outcome, ("bomb.yaml:",)) is None, outcome
    (tmp_path / "data").mkdir()
    (tmp_path / "bomb.yaml").rename(tmp_path / "data" / "bomb.yaml")
    outcome = train("--config-name", "demo", "--config-dir", str(tmp_path), "data=bomb")
    assert fault_of_refusal(outcome, ("data/bomb.yaml:",)) is None, outcome
    assert time.monotonic() - begin < 5


def test_references_that_a_run_file_needs_still_work(tmp_path: Path) -> None:
    run = yaml.safe_dump(yaml.safe_load(to_yaml(tiny_run(tmp_path))))
    text = run.replace("batch_size: 4", "batch_size: &size 4").replace("seed: 3", "seed: *size")
    assert text.count("size 4") == 1
    (tmp_path / "mine.yaml").write_text(text)
    outcome = train("--config-name", "mine", "--config-dir", str(tmp_path), "--print-config")
    assert yaml.safe_load(outcome.out)["training"]["seed"] == 4


def test_an_override_of_a_megabyte_or_nested_deep_is_one_line() -> None:
    for value in ("x" * (2 << 20), "[" * 1500 + "]" * 1500, "{a:" * 800 + "1" + "}" * 800):
        outcome = train("--config-name", "demo", f"data.train={value}")
        assert fault_of_refusal(outcome, ("data.train",)) is None, outcome.err[:300]


# A process of its own: in a fork, pages of the parent would count.
_PEAK_OF_PREPROCESS = """
import re, sys
from data_tools.cli import run_command
from data_tools.preprocess import main

def peak_kb():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])

before = peak_kb()
code = run_command(main)
print(peak_kb() - before)
sys.exit(code)
"""


def _tokenize_bomb(folder: Path, path: Path) -> tuple[Outcome, int]:
    """The outcome, and the bytes of memory that the command took beyond its imports."""
    options = ["--input", path, "--output", folder / "out", "--tokenizer", "bytes"]
    command = [sys.executable, "-c", _PEAK_OF_PREPROCESS, *map(str, options), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    return Outcome(done.returncode, "", done.stderr), int(done.stdout.split()[-1]) << 10


def _open_packed(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "wb", 1))
    return cast(IO[bytes], zstandard.open(path, "wb"))


@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "bomb.txt.gz", "bomb.jsonl.zst", "bomb.txt.zst"])
def test_a_decompression_bomb_takes_no_memory_and_is_refused(name: str, tmp_path: Path) -> None:
    """512 MiB of one letter in half a megabyte or less."""
    path = tmp_path / name
    block = b"x" * (1 << 20)
    with _open_packed(path) as file:
        for _ in range(512):
            file.write(block)
    assert path.stat().st_size < 4 << 20
    outcome, memory = _tokenize_bomb(tmp_path, path)
    print(f"{name}: {path.stat().st_size:,} bytes, {memory >> 20} MiB")
    assert fault_of_refusal(outcome, (str(path),)) is None, outcome
    assert memory < 200 << 20
    assert not list(tmp_path.glob("out.[bij]*"))


COMMANDS = {
    "a wrong setting": ["pretrain/train.py", "--config-name", "demo", "training.lr=nan"],
    "an unknown option": ["pretrain/train.py", "--config-name", "demo", "--seed=3"],
    "no such corpus": ["-m", "data_tools.verify", "nothing"],
    "no such text": [
        "-m",
        "data_tools.preprocess",
        "--input",
        "no",
        "--output=x",
        "--tokenizer=bytes",
    ],
    "no such model": ["-m", "models.convert", "from-hf", "--model", "nothing", "--output", "x"],
    "no such run": ["-m", "pretrain.plot", "nothing"],
    "no such checkpoint": ["-m", "pretrain.checkpoint", "verify", "nothing"],
}
IMPORT_TORCH = ("no such model", "no such run", "no such checkpoint")  # for seconds


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=pytest.mark.slow) if what in IMPORT_TORCH else what
        for what in COMMANDS
    ],
)
def test_the_process_ends_with_code_2_and_one_line(what: str, tmp_path: Path) -> None:
    """What the other tests see inside a process is what a shell sees."""
    command = [sys.executable, *COMMANDS[what]]
    if command[1].endswith(".py"):
        command[1] = str(ROOT / command[1])
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert fault_of_refusal(Outcome(done.returncode, done.stdout, done.stderr)) is None, done
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_a_file_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path / "run")
    store.save(contents(3))
    step = tmp_path / "run" / "checkpoints" / "step_3"
    for file in [path for path in sorted(step.rglob("*")) if path.is_file()]:
        elsewhere = tmp_path / "elsewhere"
        shutil.move(file, elsewhere)
        file.symlink_to(elsewhere)
        with pytest.raises(CheckpointError, match=rf"{re.escape(str(file))}.*symbolic link"):
            store.find("auto")
        file.unlink()
        shutil.move(elsewhere, file)
    assert_holds(store.find("auto"), 3)
    store.close()


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers"),
        ("model_type", {"a": 1}, "config.json"),
        ("max_position_embeddings", 10**30, "sizes"),
        ("hidden_size", 10**30, "config"),
    ],
)
def test_a_config_json_of_sizes_that_nothing_has_is_refused(
    key: str, value: Any, name: str, tmp_path: Path
) -> None:
    """A billion layers before they are listed."""
    write_checkpoint(tmp_path / "step_0", config())
    model = tmp_path / "model"
    arguments = ("--checkpoint", str(tmp_path / "step_0"), "--output", str(model))
    assert tool("models.convert", "to-hf", *arguments, "--no-tokenizer").code == 0
    contents = json.loads((model / "config.json").read_text()) | {key: value}
    (model / "config.json").write_text(json.dumps(contents))
    arguments = ("--model", str(model), "--output", str(tmp_path / "out"))
    outcome = tool("models.convert", "from-hf", *arguments)
    assert fault_of_refusal(outcome, (name,)) is None, outcome
    assert not (tmp_path / "out").exists()
