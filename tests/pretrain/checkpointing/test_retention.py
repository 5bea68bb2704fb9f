"""Retention of checkpoints, during a run and when pruned by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.checkpoint import main
from pretrain.checkpointing.retention import surplus
from pretrain.config import parse_config
from pretrain.errors import ConfigError
from tests.pretrain.checkpointing.fixtures import assert_holds, contents, flip_bit, open_store
from tests.pretrain.run_values import run_values
from tests.refusals import assert_refused


def entries(run_dir: Path) -> list[str]:
    return sorted(entry.name for entry in (run_dir / "checkpoints").iterdir())


def test_retention_keeps_the_newest_and_never_deletes_the_one_just_written(tmp_path: Path) -> None:
    store = open_store(tmp_path, keep=2)
    for step in (8, 9, 10, 100):
        store.save(contents(step))
    assert entries(tmp_path) == ["latest", "step_10", "step_100"]

    store.close()
    store = open_store(tmp_path, keep=1)
    flip_bit(tmp_path / "checkpoints" / "step_100" / "trainer.json", 5)
    assert_holds(store.find("auto"), 10)
    store.save(contents(11))  # step 100 is damaged: it must not count as the newest
    assert entries(tmp_path) == ["latest", "step_100", "step_11"]


def test_multiples_of_a_step_stay_for_good(tmp_path: Path) -> None:
    store = open_store(tmp_path, keep=1, keep_every=4)
    for step in (2, 4, 6, 8, 10):
        store.save(contents(step))
    assert entries(tmp_path) == ["latest", "step_10", "step_4", "step_8"]


@pytest.mark.parametrize(
    ("keep", "keep_every", "gone"),
    [(2, None, [30, 20, 10]), (9, None, []), (1, 20, [30, 10]), (3, 10, [])],
)
def test_what_is_surplus(keep: int, keep_every: int | None, gone: list[int]) -> None:
    assert surplus([50, 40, 30, 20, 10], keep=keep, keep_every=keep_every) == gone


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    store = open_store(tmp_path, keep=9)
    for step in (5, 6, 7, 8):
        store.save(contents(step))
    store.close()
    return tmp_path


def test_pruning_keeps_the_newest_complete_ones(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "checkpoints" / "step_8" / "trainer.json").unlink()
    assert main(["prune", str(run_dir), "--keep", "1", "--keep-every", "5"]) == 0
    assert capsys.readouterr().out == "step_6: deleted\n"
    # Step 8 is incomplete: it neither counts nor goes.
    assert entries(run_dir) == ["latest", "step_5", "step_7", "step_8"]
    assert main(["prune", str(run_dir), "--keep", "1", "--keep-every", "5"]) == 0
    assert capsys.readouterr().out == "nothing to delete\n"


_OWNER = """
import sys
from pathlib import Path
from parallel.checkpoint.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_run_in_progress_is_not_pruned(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", _OWNER, str(run_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"locked\n"
        assert main(["prune", str(run_dir), "--keep", "1"]) == 2
        assert f"is in use by process {owner.pid}" in capsys.readouterr().err
        owner.communicate()
    assert len(entries(run_dir)) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "DIR"], "prune needs it"),
        (["list", "DIR", "--keep", "1"], "belongs to prune"),
        (["list", "DIR", "--keep-every", "5"], "belongs to prune"),
        (["prune", "DIR", "--keep", "0"], "would keep nothing"),
        (["prune", "DIR", "--keep", "1", "--keep-every", "0"], "--keep-every 0"),
        (["prune", "DIR", "--keep", "1", "--keep-every", "-2"], "--keep-every -2"),
        (["prune", "DIR/checkpoints", "--keep", "1"], "has no checkpoints: give a run directory"),
    ],
)
def test_pruning_that_cannot_be_meant_is_refused(
    arguments: list[str], message: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.replace("DIR", str(run_dir)) for argument in arguments]
    try:
        code = main(given)
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err
    assert len(entries(run_dir)) == 5


def test_keeping_multiples_of_what_is_never_saved_is_refused() -> None:
    with assert_refused(
        "checkpoint.keep_every",
        value=15,
        constraint="checkpoint.interval=10",
        remedy="change",
        error=ConfigError,
    ):
        parse_config(run_values(checkpoint__interval=10, checkpoint__keep_every=15))
