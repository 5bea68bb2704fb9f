"""Forked ranks: one line for one that dies, and nothing left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from pretrain.prove.errors import RunFailedError
from pretrain.prove.ranks import Forks, run_ranks


def rank() -> int:
    return int(os.environ["RANK"])


def test_ranks_see_their_place(tmp_path):
    def main() -> int:
        (tmp_path / f"{rank()}").write_text(os.environ["WORLD_SIZE"])
        return 0

    with Forks() as forks:
        run_ranks(forks, main, size=3, logs=tmp_path / "logs", timeout=60)
    assert [(tmp_path / str(r)).read_text() for r in range(3)] == ["3"] * 3


def dies() -> int:
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
    return 0


def fails() -> int:
    if rank() == 1:
        print("error: no space left")
        return 2
    print("error: another rank is gone")
    return 6


def hangs() -> int:
    time.sleep(600)
    return 0


@pytest.mark.parametrize(
    ("main", "timeout", "message"),
    [
        (dies, 60, r"rank 1 .*SIGKILL"),
        (fails, 60, r"rank 1 .*2.*: error: no space"),
        (hangs, 1, r"rank 0 .* 1 s"),
    ],
)
def test_the_rank_that_failed_is_named_and_none_is_left(main, timeout, message, tmp_path):
    before = _children()
    # Ranks that all end by themselves are waited for, however long that takes.
    with Forks(patience=30.0 if main is fails else 0.5) as forks:
        with pytest.raises(RunFailedError, match=message) as caught:
            run_ranks(forks, main, size=3, logs=tmp_path, timeout=timeout)
        assert "\n" not in str(caught.value)
    assert _children() <= before


def _children() -> set[int]:
    """Processes that this one has started, ended and unreaped ones included."""
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return {int(pid) for pid in path.read_text().split()}


def test_processes_end_with_the_block(tmp_path):
    with Forks() as forks:
        pid = forks.start(hangs, tmp_path / "log")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_call_returns_its_result_or_says_what_failed(tmp_path):
    def raises() -> int:
        raise ValueError("error: a reason")

    with Forks() as forks:
        assert forks.call("the work", lambda: {"a": 1}, tmp_path / "a", timeout=60) == {"a": 1}
        with pytest.raises(RunFailedError, match="a reason"):
            forks.call("the work", raises, tmp_path / "b", timeout=60)
