"""Every end of a run has its exit code, and is reported once."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from data_tools.sampling.token_dataset import TokenDataset
from pretrain import errors, train
from pretrain.checkpointing import CheckpointStore
from pretrain.config import to_yaml
from pretrain.engine.engine import PlainEngine
from pretrain.errors import (
    EXIT_COMPLETED,
    EXIT_LOST_RANK,
    EXIT_NOT_FINITE,
    EXIT_OUT_OF_MEMORY,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
)
from pretrain.supervision.signals import GracefulStop
from tests.distributed import run_ranks
from tests.pretrain.tiny_run import metrics, tiny_run, write_data

STEPS = 6
README = Path(__file__).resolve().parents[2] / "pretrain/README.md"


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("codes")
    write_data(directory)
    config = tiny_run(directory, training__max_steps=STEPS, training__batch_size=2)
    (directory / "tiny.yaml").write_text(to_yaml(config))
    return directory


def _before(owner: type, name: str, count: int, fault: Callable[[], object]) -> None:
    """Let the `count`-th call of a method on this rank meet a fault."""
    original, calls = getattr(owner, name), []

    def faulty(*args, **kwargs):
        calls.append(None)
        if len(calls) == count:
            fault()
        return original(*args, **kwargs)

    setattr(owner, name, faulty)


def _io_error() -> None:
    raise OSError(errno.EIO, "Input/output error", "/data/corpus.bin")


def _step(fault: Callable[[], object], *, count: int = 3) -> Callable[[], None]:
    return lambda: _before(PlainEngine, "train_step", count, fault)


def _signals(*numbers: signal.Signals) -> Callable[[], None]:
    def send() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return send


# name -> (what to do on rank 1 before the run, code of rank 0, of rank 1, what is said in all)
FAULTS = {
    "nothing": (lambda: None, EXIT_COMPLETED, EXIT_COMPLETED, []),
    "memory of a device": (
        _step(lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory."))),
        EXIT_LOST_RANK,
        EXIT_OUT_OF_MEMORY,
        [r"error on rank 1: out of memory: lower training.batch_size .*\(CUDA out of memory"],
    ),
    "memory of the host, torch": (
        _step(lambda: torch.empty(1 << 50)),
        EXIT_LOST_RANK,
        EXIT_OUT_OF_MEMORY,
        ["error on rank 1: out of memory: lower training.batch_size .*DefaultCPUAllocator"],
    ),
    "memory of the host, Python": (
        _step(lambda: bytearray(1 << 60)),
        EXIT_LOST_RANK,
        EXIT_OUT_OF_MEMORY,
        ["error on rank 1: out of memory: lower training.batch_size"],
    ),
    "data that cannot be read": (
        lambda: _before(TokenDataset, "read", 5, _io_error),
        EXIT_LOST_RANK,
        EXIT_USER_ERROR,
        [
            r"error on rank 1: data source \S+: micro-batch 4 of data rank 1, tokens from \[\d+.*"
            r", cannot be read: .*Input/output error: '/data/corpus.bin'"
        ],
    ),
    "a signal in a step": (_step(_signals(signal.SIGTERM)), EXIT_STOPPED, EXIT_STOPPED, []),
    "signals in a save": (
        lambda: _before(
            CheckpointStore,
            "save",
            1,
            _signals(signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1),
        ),
        EXIT_STOPPED,
        EXIT_STOPPED,
        [],
    ),
    "signals in an evaluation": (
        lambda: _before(PlainEngine, "evaluate", 1, _signals(signal.SIGUSR1, signal.SIGUSR1)),
        EXIT_STOPPED,
        EXIT_STOPPED,
        [],
    ),
}
# The last step of a run that a signal stops: that step, or the one after a save or an evaluation.
LAST = {"a signal in a step": 3, "signals in a save": 3, "signals in an evaluation": 3}


def _run(configs: Path, run_dir: Path, fault: str) -> tuple[int, str]:
    if os.environ["RANK"] == "1":
        FAULTS[fault][0]()
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        arguments = ["--config-name", "tiny", "--config-dir", str(configs), f"run_dir={run_dir}"]
        code = train.main(arguments)
    lines = [line for line in said.getvalue().splitlines() if "error" in line]
    return code, "\n".join(lines)


SLOW = ("memory of the host, Python", "signals in an evaluation", "a signal in a step")


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in FAULTS]
)
def test_a_run_ends_with_the_code_of_its_fault_which_is_said_once(fault, configs, tmp_path):
    _, first, second, expected = FAULTS[fault]
    run_dir = tmp_path / "run"
    results = run_ranks(_run, 2, configs, run_dir, fault, init=False)
    assert [code for code, _ in results] == [first, second], results
    said = [line for _, text in results for line in text.splitlines()]
    assert len(said) == len(expected), said
    assert all(re.match(pattern, line) for pattern, line in zip(expected, said, strict=True)), said
    if fault in LAST:
        trained, _ = metrics(tiny_run(configs, run_dir=str(run_dir)))
        assert trained[-1]["step"] == LAST[fault]
        assert (run_dir / f"checkpoints/step_{LAST[fault]}").is_dir()
        assert run_ranks(_run, 2, configs, run_dir, "nothing", init=False) == [(0, "")] * 2


def _wait_for_ever(number: signal.Signals) -> None:
    """A start that waits in C for a rank that does not come, and a signal to it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    with GracefulStop(starting=True):
        store.wait(["never"], timedelta(seconds=60))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_a_start_that_waits_in_c(number):
    began = time.monotonic()
    with pytest.raises(AssertionError) as ended:
        run_ranks(_wait_for_ever, 1, number, init=False)
    assert time.monotonic() - began < 5
    assert f"exit {EXIT_STOPPED}" in str(ended.value)
    assert f"rank 0: {number.name} while the run was starting" in str(ended.value)


def _start_ignoring() -> tuple[bool, bool]:
    """Whether a stop is asked for by a signal in the start, that was ignored before, and after."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    asked = []
    with GracefulStop(starting=True) as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.1)
            asked.append(stop.received is not None)
            stop.started()
    return asked[0], asked[1]


def test_a_start_goes_on_where_the_launcher_has_said_to_ignore_a_signal():
    assert run_ranks(_start_ignoring, 1, init=False) == [(False, True)]


def test_the_readme_lists_every_exit_code_once():
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    listed = re.findall(r"^\| (\d+) \|", README.read_text(), re.MULTILINE)
    assert sorted(map(int, listed)) == sorted(codes)


@pytest.mark.parametrize("learning_rate", ["1e30"])
def test_a_loss_that_is_not_finite_is_said_once_by_all_ranks(learning_rate, configs, tmp_path):
    changed = tmp_path / "tiny.yaml"
    text = (configs / "tiny.yaml").read_text().replace("lr: 0.01", f"lr: {learning_rate}")
    changed.write_text(text)
    results = run_ranks(_run, 2, tmp_path, tmp_path / "run", "nothing", init=False)
    assert [code for code, _ in results] == [EXIT_NOT_FINITE] * 2
    assert results[1][1] == ""
