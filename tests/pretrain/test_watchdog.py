"""A rank that stands still ends the run: in time, by name, with the stacks of those that live."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from pretrain.errors import EXIT_HUNG
from pretrain.loop import run as run_training
from pretrain.ranks import Ranks
from pretrain.watchdog import Progress, Watchdog, blame
from tests.distributed import run_ranks
from tests.pretrain.tiny_run import tiny_run, write_data

TIMEOUT = 2.0


def _still(rank: int, how: str, metrics: Path) -> None:
    """Let a rank stand still once the run has taken two steps, and note when."""
    while not (metrics.exists() and metrics.read_text().count('"loss"') >= 2):
        time.sleep(0.02)
    (metrics.parent / "still").write_text(str(time.time()))
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)


def _train(config, rank: int, how: str) -> None:
    if int(os.environ["RANK"]) == rank:
        signal.signal(signal.SIGALRM, lambda *_: time.sleep(1e6))
        arguments = (rank, how, Path(config.run_dir, "metrics.jsonl"))
        threading.Thread(target=_still, args=arguments, daemon=True).start()
    run_training(config)


@pytest.mark.parametrize(
    ("layout", "rank", "how"),
    [
        ({}, 1, "stopped"),
        ({"parallel__tensor": 2}, 0, "stopped"),
        ({"parallel__pipeline": 2}, 1, "asleep"),
    ],
    ids=["data, rank 1 stopped", "tensor, rank 0 stopped", "pipeline, rank 1 asleep"],
)
def test_a_rank_that_stands_still_is_named_in_time(layout, rank, how, tmp_path):
    write_data(tmp_path)
    limits = {"training__max_steps": 100_000, "checkpoint__interval": 100_000}
    config = tiny_run(
        tmp_path, **limits, watchdog__timeout=TIMEOUT, evaluation__interval=100_000, **layout
    )
    with pytest.raises(AssertionError) as ended:
        run_ranks(_train, 2, config, rank, how, init=False)
    waited = time.time() - float(Path(config.run_dir, "still").read_text())
    report = str(ended.value)
    assert f"exit {EXIT_HUNG}" in report
    said = re.findall(r"error on rank \d: (.*)", report)
    assert all("no progress in step" in line for line in said)
    named = {
        (1, "stopped"): r"rank 1 \(process \d+ on \S+, in (starting|step \d+)\) does not answer",
        (0, "stopped"): "rank 0, which keeps the record of all ranks, does not answer",
        (1, "asleep"): r"rank 1 \(process \d+ on \S+, in step \d+\) has come least far|equally far",
    }[rank, how]
    assert all(re.search(named, line) for line in said), report
    # One rank's process ends 5 s after the timeout at the latest; the harness then ends the other.
    assert waited < TIMEOUT + 5 + 6
    stacks = Path(config.run_dir, f"stacks_rank_{1 - rank:05d}.txt").read_text()
    # What a rank waits for: a collective of the step, or to hear whether another wants to stop.
    assert re.search(r"in (train_step|should_stop)\n", stacks), stacks


def _beat(folder: Path, moves: int) -> str | None:
    rank = int(os.environ["RANK"])
    verdicts: list[str] = []
    ranks = Ranks.of_group(dist_world())
    with Watchdog(folder, ranks=ranks, timeout=1.0, end=verdicts.append) as watchdog:
        for step in range(moves if rank == 2 else moves + 2):
            watchdog.moved(f"step {step}")
            time.sleep(0.2)
        time.sleep(6)
    return verdicts[0] if verdicts else None


def dist_world():
    import torch.distributed as dist

    assert dist.group.WORLD is not None
    return dist.group.WORLD


def test_all_ranks_give_one_verdict_and_it_names_the_one_that_is_behind(tmp_path):
    verdicts = run_ranks(_beat, 3, tmp_path, 4)
    assert len(set(verdicts)) == 1
    assert re.search(r"no progress in step \d for 1 s .*: rank 2 .*in step 3\) has come least far",
                     verdicts[0])  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"stacks_rank_0000{rank}.txt" for rank in range(3)
    ]


def _calm(folder: Path) -> list[str]:
    verdicts: list[str] = []
    ranks = Ranks.of_group(dist_world())
    with Watchdog(folder, ranks=ranks, timeout=1.0, end=verdicts.append) as watchdog:
        for step in range(8):
            watchdog.moved(f"step {step}")
            time.sleep(0.3)
    return verdicts


def test_ranks_that_move_are_left_alone(tmp_path):
    assert run_ranks(_calm, 2, tmp_path) == [[], []]


def test_one_process_alone_is_watched_too(tmp_path):
    verdicts: list[str] = []
    with Watchdog(tmp_path, ranks=Ranks(), timeout=0.5, end=verdicts.append):
        time.sleep(1.5)
    assert "there is no other rank" in verdicts[0]


def test_who_is_to_blame():
    progress = [Progress("host", 10 + r, beats=5, moves=7, activity="step 3") for r in range(3)]
    before = dict(enumerate(progress))
    after = {rank: p._replace(beats=6) for rank, p in before.items()}
    assert blame(before, after, own_rank=0).startswith("all ranks have come equally far")
    silent = after | {1: before[1]}
    expected = "rank 1 (process 11 on host, in step 3) does not answer"
    assert blame(before, silent, own_rank=0) == expected
    behind = after | {2: after[2]._replace(moves=6, activity="step 2")}
    assert "rank 2 (process 12 on host, in step 2) has come least far" in blame(
        before, behind, own_rank=0
    )
