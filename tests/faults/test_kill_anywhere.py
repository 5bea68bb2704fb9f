"""A run that is killed again and again trains on the same samples to the same bits."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from parallel.checkpoint.manifest import read_manifest
from tests.faults.killed_runs import (
    Moment,
    Run,
    TrainedStep,
    draw_moments,
    read_trace,
    small_run,
    train,
    undisturbed,
)
from tests.pretrain.tiny_run import write_data

RANKS = (0, 1)
IN_BACKGROUND = {"checkpoint__asynchronous": True}


def attempts(config, directory: Path, moments: list[Moment]) -> list[Path]:
    """Start the run once for each moment, at which it dies, and once more to its end."""
    traces = []
    for number, moment in enumerate([*moments, None]):
        traces.append(directory / f"attempt_{number:02d}")
        if moment is None:
            train(config, traces[-1])
            continue
        with pytest.raises(AssertionError, match=rf"rank {moment.by}: exit -9") as death:
            train(config, traces[-1], moment)
        if moment.victim is None:
            assert re.findall(r"rank \d: (.*)", str(death.value)) == ["exit -9"] * len(RANKS)
    return traces


class Outcome(NamedTuple):
    """`lost_steps`: of each kill, steps that had to be taken again."""

    seen: list[str]
    lost_steps: list[int]


def outcome(traces: list[list[TrainedStep]], expected: list[TrainedStep]) -> Outcome:
    """What became part of the weights: of each attempt the steps up to where the next went on.

    Every attempt's steps are compared in full: samples, loss and norm.
    """
    taken: list[TrainedStep] = []
    lost_steps = []
    for trace in traces:
        if not trace:  # killed before its first step had ended
            continue
        assert trace == expected[trace[0].step - 1 : trace[-1].step]
        resumed = trace[0].step - 1
        assert resumed <= len(taken), "steps were left out"
        lost_steps.append(len(taken) - resumed)
        taken = [*taken[:resumed], *trace]
    return Outcome([sample for step in taken for sample in step.samples], lost_steps)


def assert_nothing_lost(
    run: Run,
    tmp_path: Path,
    *,
    seed: int,
    kills: int,
    interval: int,
    most: int | None = None,
    **changes: Any,
) -> None:
    """`most`: steps that a kill may cost; by default those of an interval."""
    steps = len(read_trace(run.trace, 0))
    moments = draw_moments(seed, kills, steps=steps, interval=interval, points=run.points)
    config = small_run(tmp_path / "killed", steps=steps, interval=interval, **changes)
    traces = attempts(config, tmp_path, moments)
    lost, repeated, again = Counter[str](), Counter[str](), 0
    for rank in RANKS:
        expected = read_trace(run.trace, rank)
        found = outcome([read_trace(trace, rank) for trace in traces], expected)
        samples = [sample for step in expected for sample in step.samples]
        lost += Counter(samples) - Counter(found.seen)
        repeated += Counter(found.seen) - Counter(samples)
        again = max(again, *found.lost_steps)
        assert found.seen == samples
    files = [
        read_manifest(Path(c.run_dir, "checkpoints", f"step_{steps}")).files
        for c in (config, run.config)
    ]
    places = Counter(moment.place for moment in moments)
    print(
        f"\nkill -9: seed {seed}, {kills} kills in {steps} steps at {len(RANKS)} ranks "
        f"({', '.join(f'{n} in {place}' for place, n in sorted(places.items()))}; "
        f"{sum(m.victim is None for m in moments)} of all ranks): {lost.total()} samples lost, "
        f"{repeated.total()} repeated, at most {again} steps taken again, a save every {interval}, "
        f"{sum(a == files[1].get(n) for n, a in files[0].items())} of {len(files[1])} files of the "
        "last checkpoint equal"
    )
    assert (lost.total(), repeated.total()) == (0, 0)
    assert again <= (most or interval)
    assert files[0] == files[1]


def test_three_kills_lose_and_repeat_nothing(tmp_path: Path) -> None:
    write_data(tmp_path)
    run = undisturbed(tmp_path, steps=24, interval=4)
    assert_nothing_lost(run, tmp_path, seed=5, kills=3, interval=4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_twenty_kills_over_a_long_run_lose_and_repeat_nothing(seed: int, tmp_path: Path) -> None:
    write_data(tmp_path)
    run = undisturbed(tmp_path, steps=200, interval=10)
    assert_nothing_lost(run, tmp_path, seed=seed, kills=20, interval=10)


@pytest.mark.slow
def test_twenty_kills_of_a_run_that_saves_in_the_background_lose_and_repeat_nothing(
    tmp_path: Path,
) -> None:
    write_data(tmp_path)
    run = undisturbed(tmp_path, steps=200, interval=10, **IN_BACKGROUND)
    # The save that is under way is lost, too: it has begun one interval before.
    assert_nothing_lost(run, tmp_path, seed=3, kills=20, interval=10, most=20, **IN_BACKGROUND)


def test_the_moments_of_long_runs_are_of_every_kind() -> None:
    moments = list(
        itertools.chain.from_iterable(
            draw_moments(seed, 20, steps=200, interval=10, points=[40, 15]) for seed in (1, 2)
        )
    )
    assert {m.place for m in moments} == {"load", "train", "between", "save"}
    assert {m.victim for m in moments} == {0, 1, None}
    assert len({m.point for m in moments if m.place == "save"}) > 8


def test_a_trace_with_another_sample_or_a_gap_is_found() -> None:
    steps = [TrainedStep(n, (f"sample {n}",), "0x1", "0x1") for n in range(1, 7)]
    assert outcome([steps[:4], [], steps[2:]], steps) == outcome([steps], steps)._replace(
        lost_steps=[0, 2]
    )
    with pytest.raises(AssertionError, match="left out"):
        outcome([steps[:2], steps[3:]], steps)
    with pytest.raises(AssertionError):
        outcome([[*steps[:5], steps[5]._replace(samples=("another",))]], steps)
