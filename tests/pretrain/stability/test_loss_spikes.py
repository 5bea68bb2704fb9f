"""Loss spikes: return to a checkpoint without the data around one, and skip them."""

from __future__ import annotations

import itertools
import logging
import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  what bf16 imports
import pytest

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from data_tools.sampling.order_record import read_records
from parallel.checkpoint.manifest import read_manifest
from pretrain.checkpointing.directory import steps_in
from pretrain.config import ConfigError, parse_config
from pretrain.config.sections import SpikeConfig
from pretrain.errors import EXIT_COMPLETED
from pretrain.loop import TrainLoop
from pretrain.stability.loss_spikes import SpikeDetector
from tests.distributed import run_ranks
from tests.models.families import CASES
from tests.pretrain.run_values import run_values
from tests.pretrain.spiking_run import run_spiking
from tests.pretrain.tiny_run import metrics, offloading, stopped_after, tiny_run, zero_file
from tests.refusals import assert_refused
from tests.tiers import tiered

STEPS, SPIKE = 10, 7


def test_a_loss_stands_out_from_a_full_window_only_and_does_not_enter_it():
    watch = SpikeDetector(SpikeConfig(sigma=3.0, window=4))
    assert not any(watch.observe(loss) for loss in (100.0, 2.0, 2.1, 1.9))
    for loss in (2.0, 2.1, 1.9, 2.0):  # the first one has left the window
        assert not watch.observe(loss)
    assert watch.observe(2.4)
    assert watch.observe(2.4)
    assert not watch.observe(float("nan"))
    assert not watch.observe(2.1)
    restored = SpikeDetector(SpikeConfig(sigma=3.0, window=4))
    restored.load_state_dict(watch.state_dict())
    assert restored.observe(2.4)


def _config(data: Path, run_dir: Path, **changes):
    settings = {
        "training__max_steps": STEPS,
        "checkpoint__interval": 3,
        "checkpoint__keep": 9,
        "evaluation__interval": 5,
        "stability__spike__sigma": 20.0,
        "stability__spike__window": 3,
        "stability__spike__skip_before": 1,
    }
    return tiny_run(data, run_dir=str(run_dir), **(settings | changes))


def _run(
    config, steps: tuple[int, ...], world_size: int, zero: int | dict[str, Any]
) -> list[int | str]:
    ds_config = zero_file(zero, Path(config.run_dir))
    return run_ranks(run_spiking, world_size, config, ds_config, steps, init=False)


def _curve(config) -> list[tuple[float, ...]]:
    trained, evaluated = metrics(config)
    curve = [(r["step"], r["loss"], r["grad_norm"], r["lr"], r["tokens"]) for r in trained]
    return curve + [(r["step"], r["eval_loss"]) for r in evaluated]


def _assert_equal_checkpoints(config, expected, *, steps: list[int]) -> None:
    """The checkpoints of two runs hold the same state, bit for bit."""
    folders = [Path(each.run_dir, "checkpoints") for each in (config, expected)]
    for step in steps:
        ours, theirs = (folder / f"step_{step}" for folder in folders)
        files = read_manifest(ours).files
        assert files.keys() == read_manifest(theirs).files.keys()
        for name in files:
            if name.endswith(".safetensors"):
                assert (ours / name).read_bytes() == (theirs / name).read_bytes(), (step, name)


DP2 = {"training__batch_size": 2}
BF16 = {"training__precision": "bf16"}
# A longer sequence from step 5 on, and a larger batch from step 7 on, between skipped steps.
GROWING = {
    "data__stages": [{"until_step": 4, "sequence_length": 16}, {}],
    "training__batch_ramp": [{"until_tokens": 4 * 64 + 2 * 128, "sequences_per_step": 4}],
}
LAYOUTS = {
    "ZeRO-0": (1, 0, {}),
    "ZeRO-1 DP2": (2, 1, DP2),
    "ZeRO-3 DP2": (2, 3, DP2),
    "bf16": (1, 1, BF16),
    "PP2": (2, 1, {"parallel__pipeline": 2}),
    "ramp and stages": (1, 0, GROWING),
    "mod": (1, 1, {"model": CASES["mod"].config.model_dump()}),
    "asynchronous saves": (2, 1, DP2 | {"checkpoint__asynchronous": True}),
    "muon ZeRO-0": (1, 0, {"training__optimizer": "muon"}),
    "muon bf16 DP2": (2, 1, DP2 | BF16 | {"training__optimizer": "muon"}),
    "bf16 offload": (1, offloading(1), BF16),
    "bf16 offload ZeRO-2 DP2": (2, offloading(2), DP2 | BF16),
    "bf16 offload ZeRO-3 DP2": (2, offloading(3), DP2 | BF16),
    "bf16 offload PP2": (2, offloading(1), BF16 | {"parallel__pipeline": 2}),
}


ORDINARY = {
    ("ZeRO-3 DP2", 4),
    ("PP2", 1),
    ("ramp and stages", 1),
    ("mod", 4),
    ("bf16 offload", 4),
}


@pytest.mark.parametrize(
    ("layout", "log_interval"), tiered(itertools.product(LAYOUTS, [1, 4]), ORDINARY)
)
def test_the_run_goes_on_as_one_that_never_saw_the_data_around_the_spike(
    layout, log_interval, data, tmp_path
):
    world_size, stage, changes = LAYOUTS[layout]
    changes = changes | {"training__log_interval": log_interval}
    seen_at = 7 if log_interval == 1 else 8
    expected = _config(data, tmp_path / "a", stability__skip_steps=[[6, seen_at]], **changes)
    assert _run(expected, (), world_size, stage) == [EXIT_COMPLETED] * world_size
    spiking = _config(data, tmp_path / "b", **changes)
    assert _run(spiking, (SPIKE,), world_size, stage) == [EXIT_COMPLETED] * world_size
    assert _curve(spiking)[-1] == _curve(expected)[-1]
    *_, order = read_records(Path(spiking.run_dir))
    assert (order.seen_step, order.skipped_steps) == (seen_at, ((6, seen_at),))
    # The way back is a start: its first step is logged, whatever the interval.
    assert set(_curve(expected)) <= set(_curve(spiking))
    # Step 6 was saved with the data around the spike, deleted, and saved anew without them.
    assert steps_in(Path(spiking.run_dir, "checkpoints")) == [10, 9, 6, 3]
    _assert_equal_checkpoints(spiking, expected, steps=[3, 6, 9, 10])


def test_a_run_that_keeps_returning_ends(data, tmp_path):
    config = _config(data, tmp_path, stability__spike__max_rollbacks=1)
    ends = _run(config, (SPIKE, 9), 2, 1)
    assert ends[0] == ends[1]
    assert re.fullmatch(
        r"step 9: loss [\d.]+ is above [\d.]+, 20 standard deviations over the last 3 steps: "
        r"the run has returned to an earlier step 1 times already; lower training.lr, or raise "
        r"stability.spike.max_rollbacks",
        str(ends[0]),
    )


def test_the_bound_also_holds_for_a_run_that_went_beyond_it_before(data, tmp_path):
    config = _config(data, tmp_path, stability__spike__max_rollbacks=2)
    assert _run(config, (SPIKE, 9), 1, 0) == [EXIT_COMPLETED]
    changes = {"training__max_steps": STEPS + 4, "stability__spike__max_rollbacks": 1}
    (end,) = _run(_config(data, tmp_path, **changes), (STEPS + 3,), 1, 0)
    assert "the run has returned to an earlier step 2 times already" in str(end)


def test_without_a_checkpoint_before_it_there_is_no_way_back(data, tmp_path):
    config = _config(data, tmp_path, checkpoint__interval=8)
    assert "there is no checkpoint yet to return to" in str(_run(config, (SPIKE,), 1, 0)[0])
    assert not list(Path(config.run_dir, "checkpoints").glob("step_*"))


def _warned(config, ds_config_path, steps: tuple[int, ...]) -> list[str]:
    """The warnings of a spiking run."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pretrain").addHandler(handler)
    assert run_spiking(config, ds_config_path, steps) == EXIT_COMPLETED
    return messages


def _run_alone(config, steps: tuple[int, ...] = (), *, entry=_warned) -> list[str]:
    return run_ranks(entry, 1, config, "configs/ds/zero0.json", steps, init=False)[0]


def _stop(config, *, after: int) -> None:
    run_ranks(stopped_after(after), 1, config, "configs/ds/zero0.json", init=False)


def test_each_of_several_spikes_leaves_no_trace(data, tmp_path):
    expected = _config(data, tmp_path / "a", stability__skip_steps=[[6, 7], [8, 9]])
    spiking = _config(data, tmp_path / "b")
    _run_alone(expected)
    messages = [each for each in _run_alone(spiking, (SPIKE, 9)) if "is above" in each]
    assert [each.split(": ")[-1] for each in messages] == [
        "back to step 3; the data of steps 6 to 7 are skipped",
        "back to step 6; the data of steps 8 to 9 are skipped",
    ]
    _assert_equal_checkpoints(spiking, expected, steps=[3, 6, 9, 10])
    *_, order = read_records(Path(spiking.run_dir))
    assert order.skipped_steps == ((6, 7), (8, 9))


def test_retention_leaves_what_a_rollback_needs(data, tmp_path):
    changes = {
        "checkpoint__interval": 1,
        "checkpoint__keep": 1,
        "stability__spike__skip_before": 2,
    }
    expected = _config(data, tmp_path / "a", stability__skip_steps=[[5, 7]], **changes)
    spiking = _config(data, tmp_path / "b", **changes)
    _run_alone(expected)
    assert any("back to step 4; " in each for each in _run_alone(spiking, (SPIKE,)))
    _assert_equal_checkpoints(spiking, expected, steps=[10])
    assert len(steps_in(Path(spiking.run_dir, "checkpoints"))) == 3


def test_without_a_checkpoint_that_early_the_oldest_is_taken_and_the_log_says_what_stays(
    data, tmp_path
):
    changes = {"checkpoint__interval": 5, "stability__spike__skip_before": 3}
    expected = _config(data, tmp_path / "a", stability__skip_steps=[[6, 7]], **changes)
    spiking = _config(data, tmp_path / "b", **changes)
    _run_alone(expected)
    (message,) = (each for each in _run_alone(spiking, (SPIKE,)) if "is above" in each)
    assert message.endswith(
        ": back to step 5, the oldest checkpoint, which holds 2 of the steps to be skipped (4 to "
        "5); the data of steps 6 to 7 are skipped"
    )
    _assert_equal_checkpoints(spiking, expected, steps=[5, 10])


def _killed_after_its_rollback(config, ds_config_path, steps, *, after: int) -> None:
    """A spiking run that is killed once it has returned and has taken step `after` again."""
    prepare = TrainLoop._prepare

    def killed(self, *, first: bool) -> None:
        if self.rollback.skipped and self.state.step == after:
            os.kill(os.getpid(), signal.SIGKILL)
        prepare(self, first=first)

    TrainLoop._prepare = killed  # for good: the process ends
    run_spiking(config, ds_config_path, steps)


def _run_killed(config, steps: tuple[int, ...], *, after: int) -> None:
    killed = partial(_killed_after_its_rollback, after=after)
    with pytest.raises(AssertionError, match="exit -9"):
        _run_alone(config, steps, entry=killed)


@pytest.mark.parametrize("after", tiered([3, 6], [6]))
def test_a_run_that_is_killed_after_its_rollback_still_skips_the_data(after, data, tmp_path):
    """Before its first step, and after a save that knows of them."""
    expected = _config(data, tmp_path / "a", stability__skip_steps=[[6, 7]])
    spiking = _config(data, tmp_path / "b", stability__spike__max_rollbacks=1)
    _run_alone(expected)
    _run_killed(spiking, (SPIKE,), after=after)
    _run_alone(spiking)
    _assert_equal_checkpoints(spiking, expected, steps=[3, 6, 9, 10])
    *_, order = read_records(Path(spiking.run_dir))
    assert order.skipped_steps == ((6, 7),)
    # The rollback counts, too.
    longer = _config(
        data, tmp_path / "b", stability__spike__max_rollbacks=1, training__max_steps=STEPS + 4
    )
    assert "1 times already" in str(_run(longer, (STEPS + 3,), 1, 0)[0])


DOUBLE = {"training__gradient_accumulation_steps": 4}


def test_the_same_data_are_skipped_in_steps_of_another_size(data, tmp_path):
    """Samples 40 to 55, which were steps 6 and 7, are step 5 from a resume at step 3 on."""
    spiking, expected = (_config(data, tmp_path / name) for name in "ba")
    _run_killed(spiking, (SPIKE,), after=3)
    _stop(expected, after=3)
    _run_alone(_config(data, tmp_path / "b", **DOUBLE))
    _run_alone(_config(data, tmp_path / "a", stability__skip_steps=[[5, 5]], **DOUBLE))
    _assert_equal_checkpoints(spiking, expected, steps=[3, 6, 9, 10])
    *_, order = read_records(Path(spiking.run_dir))
    assert order.skipped_steps == ((5, 5),)


def test_behind_a_resume_with_another_batch_rather_too_much_is_skipped(data, tmp_path):
    """Steps of 8 samples up to step 4, then of 16; the way back leads to step 2, from where on
    steps have 16. Where step 3 began is no longer known, so all samples since are skipped: 16 to
    63, which are steps 3 to 5 now."""
    changes = {"checkpoint__interval": 2, "stability__spike__skip_before": 2}
    _stop(_config(data, tmp_path / "b", **changes), after=4)
    spiking = _config(data, tmp_path / "b", **changes, **DOUBLE)
    messages = _run_alone(spiking, (6,))
    assert any(
        each.endswith("back to step 2; the data of steps 3 to 5 are skipped") for each in messages
    )
    _stop(_config(data, tmp_path / "a", **changes), after=2)
    expected = _config(data, tmp_path / "a", stability__skip_steps=[[3, 5]], **changes, **DOUBLE)
    _run_alone(expected, (6,))  # which is no spike again before three losses were seen
    _assert_equal_checkpoints(spiking, expected, steps=[2, 4, 6, 8, 10])


def test_behind_a_change_of_the_data_the_log_says_that_others_are_skipped(data, tmp_path):
    changes = {"checkpoint__interval": 2, "stability__spike__skip_before": 2}
    _stop(_config(data, tmp_path, **changes), after=4)
    stages = [{"until_step": 9}, {"sequence_length": 16}]
    messages = _run_alone(_config(data, tmp_path, data__stages=stages, **changes), (6,))
    (message,) = (each for each in messages if "is above" in each)
    assert message.endswith(
        "back to step 2; the data of steps 4 to 6 are skipped; data.stages changed after step 2, "
        "so these are other data than those around the spike"
    )


@pytest.mark.parametrize(
    ("setting", "value", "others"),
    [
        ("window", 10, ("training.max_steps=10",)),
        ("skip_before", 7, ("checkpoint.interval=3", "training.max_steps=10")),
    ],
)
def test_rollbacks_that_no_step_of_the_run_can_lead_to_are_refused(setting, value, others):
    spike = {"sigma": 6.0, "window": 9, "skip_before": 6}
    parse_config(run_values(checkpoint__interval=3, stability__spike=spike))
    wrong = run_values(checkpoint__interval=3, stability__spike={**spike, setting: value})
    with assert_refused(
        f"stability.spike.{setting}",
        value=value,
        constraint=others,
        remedy=("lower", "stability.spike=null"),
        error=ConfigError,
    ):
        parse_config(wrong)
    if setting == "skip_before":  # by time it may save after any step
        wrong["checkpoint"]["interval_minutes"] = 1.0
        parse_config(wrong)
