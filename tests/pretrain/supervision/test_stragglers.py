"""A slow rank is found within 20 steps, and noise is not mistaken for one."""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path

import pytest

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from pretrain.engine.engine import PlainEngine
from pretrain.supervision.progress import Progress
from pretrain.supervision.stragglers import BusyTimer, StragglerDetector
from tests.distributed import run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import metrics, tiny_run, write_data

RATIO = 2.0


def _found(factors: list[list[float]], *, stages: list[int], noise: float = 0.0) -> list[list[int]]:
    """The ranks found slow in each window of a simulated run.

    `factors[window][rank]` times a tenth of a second are a rank's own work in a step.
    """
    generator, compared = random.Random(0), StragglerDetector(RATIO)
    result = []
    for window, row in enumerate(factors, start=1):
        busy = [0.1 * factor * (1 + generator.uniform(-noise, noise)) for factor in row]
        ranks = {
            rank: Progress("host", 1, stage=stages[rank], window=window, busy=seconds)
            for rank, seconds in enumerate(busy)
        }
        found = compared.compare(ranks, seconds_per_step=max(busy))
        result.append([slow.rank for slow in found])
    return result


def test_a_slow_rank_is_named_in_the_second_window_and_once():
    assert _found([[1, 3, 1, 1]] * 4, stages=[0] * 4) == [[], [1], [], []]


def test_of_two_ranks_the_slow_one_is_found():
    assert _found([[1, 3]] * 2, stages=[0, 0]) == [[], [1]]


def test_a_hiccup_of_one_window_is_not_a_slow_rank():
    assert _found([[1, 1], [1, 5], [1, 1], [1, 5], [1, 1]], stages=[0, 0]) == [[]] * 5


def _device_found(devices: list[float]) -> list[tuple[int, str]]:
    """Ranks found, and whose work, when the hosts of all take a tenth of a second of each step."""
    compared, found = StragglerDetector(RATIO), []
    for window in (1, 2, 3):
        ranks = {
            rank: Progress("host", 1, window=window, busy=0.1, device=seconds)
            for rank, seconds in enumerate(devices)
        }
        found += compared.compare(ranks, seconds_per_step=1.0)
    return [(each.rank, each.whose) for each in found]


def test_a_slow_device_is_found_where_all_hosts_wait_alike():
    assert _device_found([0.3, 0.3, 0.9, 0.3]) == [(2, "its device's own")]
    assert _device_found([0.3, 0.3, 0.4, 0.3]) == []


def test_devices_are_compared_where_the_time_of_all_is_known():
    assert _device_found([0.0, 0.3, 0.9, 0.3]) == []


def test_noise_of_a_fifth_raises_no_alarm():
    assert _found([[1] * 8] * 1000, stages=[0] * 8, noise=0.2) == [[]] * 1000


def test_stages_of_a_pipeline_are_not_compared_with_each_other():
    assert _found([[1, 1, 4, 4]] * 3, stages=[0, 0, 1, 1]) == [[]] * 3
    assert _found([[1, 1, 4, 12]] * 2, stages=[0, 0, 1, 1]) == [[], [3]]


def test_what_a_rank_loses_little_time_with_is_not_said():
    """Own work of a tenth of a step, twice the usual, delays nobody."""
    compared = StragglerDetector(RATIO)
    for window in (1, 2, 3):
        ranks = {r: Progress("host", 1, window=window, busy=0.1 * (1 + r)) for r in range(2)}
        assert compared.compare(ranks, seconds_per_step=1.0) == []


def test_a_window_holds_enough_steps_and_samples():
    pace = BusyTimer()
    ends = [pace.add(0.1, is_busy=n % 4 == 0, steps=n // 2) for n in range(20)]
    assert ends == [False] * 19 + [True]
    assert (pace.window, pace.seconds_per_step) == (1, pytest.approx(20 * 0.1 / 9))
    assert pace.busy == pytest.approx(5 * 0.1 / 9)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_samples_of_equal_ranks_raise_no_alarm(share):
    """Own work of a share of every step, a fifth more or less, seen in samples."""
    generator, compared = random.Random(1), StragglerDetector(RATIO)
    paces = [BusyTimer() for _ in range(16)]
    for window in range(200):
        shares = [share * generator.uniform(0.8, 1.2) for _ in paces]
        for sample in range(100):
            for pace, busy in zip(paces, shares, strict=True):
                step = 10 * (window + 1) + sample // 10
                pace.add(0.02, is_busy=generator.random() < busy, steps=step)
        ranks = {
            rank: Progress("host", 1, window=pace.window, busy=pace.busy)
            for rank, pace in enumerate(paces)
        }
        assert compared.compare(ranks, seconds_per_step=paces[0].seconds_per_step) == []
    assert {pace.window for pace in paces} <= {199, 200}


def _train(config, slow_rank: int) -> None:
    if int(os.environ["RANK"]) == slow_rank:
        original = PlainEngine.train_step

        def slow(*args, **kwargs):
            time.sleep(0.35)
            return original(*args, **kwargs)

        PlainEngine.train_step = slow  # type: ignore[method-assign]
    with Path(f"{config.run_dir}.{os.environ['RANK']}").open("w") as log:
        os.dup2(log.fileno(), 2)
    run_training(config)


@pytest.mark.slow
def test_a_rank_that_sleeps_in_every_step_is_named_in_20_steps(tmp_path):
    write_data(tmp_path)
    config = tiny_run(
        tmp_path,
        training__max_steps=22,
        checkpoint__interval=1000,
        evaluation__interval=1000,
    )
    run_ranks(_train, 2, config, 1, init=False)
    said = Path(f"{config.run_dir}.0").read_text()
    [warning] = re.findall("warning: (.*)", said)
    match = re.search(
        r"rank 1 \(process .*data 1, in step (\d+)\) is slow: .*, ([\d.]+) times", warning
    )
    assert match, warning
    assert int(match[1]) <= 20
    assert float(match[2]) >= RATIO
    print(warning)
    ratios = [record.get("slowest_rank_ratio", 0) for record in metrics(config)[0]]
    assert max(ratios) >= RATIO
