"""`python -m pretrain.doctor`: every check in a situation that makes it fail, and all run files."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from pretrain.config import to_yaml
from pretrain.config.compose import compose_config
from pretrain.doctor.__main__ import main
from pretrain.doctor.environment import check_needed_packages, check_pins
from pretrain.doctor.findings import Finding
from pretrain.doctor.shared_folder import Task, check_shared_folder
from pretrain.doctor.storage import check_space, checkpoint_bytes, probe
from pretrain.files import CONFIGS
from tests.data_tools.corpora import write_corpus
from tests.distributed import free_port, run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import VOCAB, tiny_run, write_data

RUN_FILES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Outcome(NamedTuple):
    code: int
    findings: list[Finding]

    def of(self, severity: str) -> list[Finding]:
        return [each for each in self.findings if each.severity == severity]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def examine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Examine a tiny run in `tmp_path` with changed settings; `options` of the command line."""
    write_data(tmp_path)

    def call(*options: str, **changes: Any) -> Outcome:
        values = {"run_dir": str(tmp_path / "run"), "training__max_steps": 20}
        run = tiny_run(tmp_path, **(values | changes))
        (tmp_path / "tiny.yaml").write_text(to_yaml(run))
        return _examined(capsys, "--config-name", "tiny", "--config-dir", str(tmp_path), *options)

    return call


def _examined(capsys: pytest.CaptureFixture[str], *arguments: str) -> Outcome:
    code = main([*arguments, "--json"])
    said = json.loads(capsys.readouterr().out)
    found = [Finding(**each) for each in said["findings"]]
    assert said["errors"] == sum(each.severity == "error" for each in found)
    assert code == (2 if said["errors"] else 0)
    for each in found:
        assert "\n" not in each.what + each.remedy
        assert each.severity == "ok" or each.remedy, each
    return Outcome(code, found)


def _only(outcome: Outcome, severity: str, section: str, *texts: str) -> None:
    """The one finding of this severity, and of any that is not ok, is about `texts`."""
    bad = [each for each in outcome.findings if each.severity != "ok"]
    assert [(each.severity, each.section) for each in bad] == [(severity, section)], bad
    for text in texts:
        assert text in f"{bad[0].what}; {bad[0].remedy}"


@pytest.mark.parametrize("name", RUN_FILES)
def test_every_run_file_lacks_its_data_and_nothing_else(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the repository may hold the corpus of the demonstration
    outcome = _examined(capsys, "--config-name", name)
    data = compose_config(name).data
    lacking = len(data.train) + len(data.validation) + (data.tokenizer is not None)
    missing = [each for each in outcome.of("error") if each.section == "data"]
    assert len(missing) == lacking
    assert all(": no " in each.what for each in missing)
    for each in missing:  # the demonstration's own command makes what is missing there
        assert ("data_tools.demo_corpus" in each.remedy) == ("data/demo/" in each.what), each
    others = [f for f in outcome.findings if f.severity != "ok" and f not in missing]
    for each in others:  # what this file does not say, and what the disk of this machine holds
        assert "the number of ranks is not known" in each.what or "checkpoints of" in each.what
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_can_start_is_fit_and_nothing_is_left_behind(examine, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    outcome = examine()
    assert (outcome.code, outcome.of("warning")) == (0, [])
    assert {each.section for each in outcome.findings} == {
        "settings", "launcher and layout", "data", "run directory", "environment", "network",
    }  # fmt: skip
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "tiny.yaml"])


@pytest.mark.parametrize(
    ("options", "section", "texts"),
    [
        (["training.max_step=1"], "settings", ["unknown key training.max_step", "did you mean"]),
        (["--ds_config", "/no/such.json"], "settings", ["/no/such.json"]),
        (["--ranks", "3", "parallel.tensor=2"], "settings", ["does not divide the world size 3"]),
        (["training.optimizer=apex_adam"], "environment", ["needs apex.optimizers"]),
        (
            ["training.optimizer=te_adam"],
            "environment",
            ["needs transformer_engine", "--no-build-isolation -e '.[fp8]'"],
        ),
    ],
)
def test_settings_layout_and_packages(options, section, texts, examine, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    _only(examine(*options), "error", section, *texts)


@pytest.mark.parametrize(
    ("package", "changes", "reason"),
    [
        (
            "wandb",
            {"logging__wandb": {"mode": "offline", "project": "p"}},
            "logging.wandb.mode=offline needs wandb",
        ),
        ("tensorboard", {"logging__tensorboard": True}, "logging.tensorboard=true needs"),
        ("mpi4py", {}, "Open MPI without MASTER_ADDR needs mpi4py"),
    ],
)
def test_packages_that_settings_or_the_launcher_need(
    package, changes, reason, examine, monkeypatch
):
    for name in ("RANK", "LOCAL_RANK", "SIZE"):
        if package == "mpi4py":
            monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", "0")
    assert examine(**changes).code == 0
    monkeypatch.setitem(sys.modules, package, None)  # as Python marks what cannot be imported
    _only(examine(**changes), "error", "environment", reason, "pip install")


def test_tasks_need_lm_eval(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    config = tiny_run(tmp_path, evaluation__tasks=["piqa"], data__tokenizer="bytes")
    (finding,) = check_needed_packages(config, launcher=None)
    assert finding.severity == "error"
    assert "evaluation.tasks needs lm_eval" in finding.what
    assert "pip install" in finding.remedy


def test_ranks_that_are_not_whole_nodes_are_found(examine):
    outcome = examine("--ranks", "6", "--ranks-per-node", "4")
    (finding,) = [each for each in outcome.of("error") if each.section == "launcher and layout"]
    assert finding.what == "6 ranks are not whole nodes of 4"


def test_tensor_ranks_across_nodes_are_named(examine, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    outcome = examine("--ranks", "2", "--ranks-per-node", "1", parallel__tensor=2)
    assert any("parallel.tensor=2 crosses nodes of 1" in f.what for f in outcome.of("warning"))


def test_variables_that_a_launcher_left_in_the_shell_are_named(examine, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    _only(examine(), "warning", "launcher and layout", "WORLD_SIZE=8 is set here", "unset")


def test_an_interrupted_preprocessing_is_told_from_a_missing_corpus(examine, tmp_path):
    (tmp_path / "half.work").mkdir()
    outcome = examine(data__train=str(tmp_path / "half"))
    _only(outcome, "error", "data", "half.bin", "run the same command again")


def test_a_truncated_corpus_is_found(examine, tmp_path):
    with open(tmp_path / "train.bin", "r+b") as file:
        file.truncate(100)
    _only(examine(), "error", "data", "100 bytes found", "preprocess it again")


def test_ids_beyond_the_vocabulary_are_found(examine):
    outcome = examine(model__vocab_size=VOCAB // 2)
    _only(outcome, "error", "data", f"model.vocab_size is {VOCAB // 2}", "set model.vocab_size to")


def test_a_tokenizer_that_did_not_make_the_corpora_is_found(examine):
    outcome = examine(data__tokenizer="bytes")
    _only(outcome, "error", "data", "was made with tokenizer tokenizer.model", "preprocess it")


def test_too_few_tokens_are_found(examine, tmp_path):
    write_corpus(tmp_path / "short", [np.arange(20)], vocab_size=VOCAB)
    outcome = examine(data__train=str(tmp_path / "short"))
    _only(outcome, "error", "data", "20 tokens, but sequence_length 32", "add text")
    limited = [{"path": str(tmp_path / "train"), "max_epochs": 1}]
    outcome = examine(data__train=limited, training__max_steps=1000)
    _only(outcome, "error", "data", "more than max_epochs 1", "shorten the run")


def test_text_read_many_times_is_named_with_the_number(examine):
    outcome = examine(training__max_steps=1000)
    _only(outcome, "warning", "data", "times, more than data.warn_epochs=4", "add text")


def test_held_out_documents_that_are_trained_on_are_found(examine, tmp_path):
    generator = np.random.default_rng(1)
    documents = [generator.integers(VOCAB, size=80) for _ in range(60)]
    write_corpus(tmp_path / "all", documents, vocab_size=VOCAB)
    write_corpus(tmp_path / "part", documents[7:10], vocab_size=VOCAB)
    outcome = examine(data__train=str(tmp_path / "all"), data__validation=str(tmp_path / "part"))
    _only(outcome, "warning", "data", "3 of 3 sampled documents are also in data.train")


def test_a_run_without_held_out_text_is_named(examine):
    outcome = examine("~evaluation", "data.validation=[]")
    _only(outcome, "warning", "data", "data.validation is empty")


def test_checkpoints_that_do_not_fit_are_found(tmp_path):
    config = compose_config("llama_70b", overrides=[f"run_dir={tmp_path}"])
    size, free = checkpoint_bytes(config), shutil.disk_usage(tmp_path).free
    assert size == 68976648192 * 14  # bf16 weights; fp32 weights and two moments
    finding = check_space(config, tmp_path, total_steps=None)
    fits = 4 * size <= free
    assert finding.severity == ("ok" if fits else "error" if free < size else "warning")
    assert "4 checkpoints of 965.67 GB" in finding.what
    # Hundreds of small ones, more than any disk of a test machine: a warning, as the first fit.
    small = compose_config(
        "demo",
        overrides=[f"run_dir={tmp_path}", "checkpoint.interval=1", "checkpoint.keep=10000000"],
    )
    finding = check_space(small, tmp_path, total_steps=10_000_000)
    assert (finding.severity, "10000000 checkpoints" in finding.what) == ("warning", True)


@pytest.mark.parametrize(
    ("minutes", "spike", "most"), [("null", "null", 1), ("30", "null", 3), ("30", "{sigma: 6}", 5)]
)
def test_a_run_that_saves_by_time_needs_room_for_all_it_keeps(minutes, spike, most, tmp_path):
    config = compose_config(
        "demo",
        overrides=[
            f"run_dir={tmp_path}",
            "checkpoint.interval=1000",
            f"checkpoint.interval_minutes={minutes}",
            "checkpoint.keep=2",
            f"stability.spike={spike}",
        ],
    )
    assert f"{most} checkpoints" in check_space(config, tmp_path, total_steps=500).what


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_size_of_a_checkpoint_is_that_of_a_real_one(precision, tmp_path):
    write_data(tmp_path)
    config = tiny_run(
        tmp_path,
        training__max_steps=2,
        training__precision=precision,
        model__hidden_size=128,
        model__intermediate_size=256,
    )
    assert run_ranks(run_training, 1, config, "configs/ds/zero1.json", init=False) == [0]
    files = (tmp_path / "run" / "checkpoints" / "step_2").rglob("*")
    written = sum(path.stat().st_size for path in files if path.is_file())
    assert checkpoint_bytes(config) == pytest.approx(written, rel=0.02)  # headers, manifest


def test_a_folder_without_files_of_ones_own_is_found(examine):
    outcome = examine(run_dir="/proc/self/run")
    errors = [each for each in outcome.of("error") if "cannot be written" in each.what]
    assert [each.section for each in errors] == ["run directory"]


def test_a_run_directory_open_to_all_is_refused(examine, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    outcome = examine()
    assert [each.section for each in outcome.of("error")] == ["run directory"]


@pytest.mark.parametrize("marker", ["DONE", "STOP"])
def test_a_run_that_job_scripts_would_not_start_is_named(marker, examine, tmp_path):
    (tmp_path / "run").mkdir(mode=0o750)
    (tmp_path / "run" / marker).touch()
    _only(examine(), "warning", "run directory", f"{marker} exists", f"remove {marker}")


def test_a_clock_apart_from_that_of_the_folder_is_found(tmp_path):
    assert [each.severity for each in probe(tmp_path)] == ["ok"]
    found = list(probe(tmp_path, now=lambda: time.time() - 500))
    assert [each.severity for each in found] == ["ok", "warning"]
    # 500 less the seconds that a busy machine takes between its own clock and the file's.
    assert re.search(r"is \+(4[5-9]\d|500)\.\d s off", found[1].what)


def test_other_versions_than_pinned_are_named(tmp_path):
    pins = tmp_path / "constraints.txt"
    pins.write_text("numpy==0.0.1\nno-such-package==1.0\n")
    (finding,) = check_pins(pins)
    assert finding.severity == "warning"
    assert f"numpy {np.__version__} (0.0.1 pinned)" in finding.what
    assert "no-such-package" not in finding.what


def test_a_master_that_has_no_address_is_found(examine, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    _only(examine("--ranks", "2"), "error", "network", "MASTER_ADDR=no-such-host.invalid")


def test_a_master_that_other_nodes_cannot_reach_is_found(examine, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    outcome = examine("--ranks", "2", "--ranks-per-node", "1")
    _only(outcome, "error", "network", "localhost is ", "which other nodes cannot reach")


def test_a_port_in_use_is_found(examine, monkeypatch):
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    assert examine("--ranks", "2").code == 0
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        _only(examine("--ranks", "2"), "error", "network", f"MASTER_PORT={port} cannot be used")


@pytest.mark.parametrize("name", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_an_interface_that_does_not_exist_is_found(name, examine, monkeypatch):
    monkeypatch.setenv(name, "none99")
    _only(examine(), "error", "network", f"{name}=none99 names no interface", "set it to one of")
    monkeypatch.setenv(name, "lo")
    assert examine().code == 0


def test_interfaces_of_nccl_are_prefixes_and_may_be_excluded(examine, monkeypatch):
    for value, code in (("l", 0), ("=l", 2), ("=lo", 0), ("^none99", 0)):
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
        assert examine().code == code, value


def _nodes(folders: list[Path], patience: float) -> list[list[Finding]]:
    """What each task of a step finds, one task for each folder."""

    def entry(folders: list[Path], patience: float) -> list[Finding]:
        task = Task(int(os.environ["RANK"]), len(folders), "7-0")
        return list(check_shared_folder(folders[task.rank], task, patience=patience))

    return run_ranks(entry, len(folders), folders, patience, init=False)


def test_nodes_that_share_a_folder_say_so_and_others_are_named(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    for found in _nodes([tmp_path / "a"] * 3, 30.0):
        assert [each.severity for each in found] == ["ok"]
    apart = _nodes([tmp_path / "a", tmp_path / "b"], 0.3)
    for rank, (finding,) in enumerate(apart):
        assert finding.severity == "error"
        assert f"what tasks {1 - rank} of 2 wrote there" in finding.what
    assert list((tmp_path / "a").iterdir()) == list((tmp_path / "b").iterdir()) == []


def test_the_command_says_it_in_lines_with_an_exit_code(tmp_path):
    arguments = ["--config-name", "demo", f"run_dir={tmp_path / 'run'}", "data.train=/no/corpus"]
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2
    assert "settings\n  ok       demo: valid" in done.stdout
    assert "  error    data.train source corpus: no /no/corpus.bin" in done.stdout
    assert done.stderr == ""
