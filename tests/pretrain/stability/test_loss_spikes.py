"""Loss spikes: return to a checkpoint without the data around one, and skip them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  what bf16 imports
import pytest

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from data_tools.sampling.order_record import read_records
from parallel.checkpoint.manifest import read_manifest
from pretrain.config.sections import SpikeConfig
from pretrain.errors import EXIT_COMPLETED, TrainingError
from pretrain.stability.loss_spikes import SpikeDetector
from tests.distributed import run_ranks
from tests.models.families import CASES
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import metrics, offloading, tiny_run, zero_file

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


def _spiking(config, ds_config_path, steps: tuple[int, ...]) -> int | str:
    """`run`, in which the loss of some steps is a hundred times as large as it should be."""
    import pretrain.engine.train_spec
    import pretrain.stability.nonfinite_steps

    now = 0
    train, objective = (
        pretrain.stability.nonfinite_steps.SkipNonFinite.train,
        pretrain.engine.train_spec.TrainSpec.objective,
    )

    def noted(self, step, samples, **kwargs):
        nonlocal now
        now = step
        return train(self, step, samples, **kwargs)

    def multiplied(self, output, targets):
        total, terms = objective(self, output, targets)
        return (total * 100, terms) if now in steps else (total, terms)

    pretrain.stability.nonfinite_steps.SkipNonFinite.train = noted
    pretrain.engine.train_spec.TrainSpec.objective = multiplied
    try:
        return run_training(config, ds_config_path)
    except TrainingError as error:
        return str(error)


def _run(
    config, steps: tuple[int, ...], world_size: int, zero: int | dict[str, Any]
) -> list[int | str]:
    ds_config = zero_file(zero, Path(config.run_dir))
    return run_ranks(_spiking, world_size, config, ds_config, steps, init=False)


def _curve(config) -> list[tuple[float, ...]]:
    trained, evaluated = metrics(config)
    curve = [(r["step"], r["loss"], r["grad_norm"], r["lr"], r["tokens"]) for r in trained]
    return curve + [(r["step"], r["eval_loss"]) for r in evaluated]


def _assert_equal_checkpoints(config, expected, *, steps: list[int]) -> None:
    """All checkpoints of two runs hold the same state, bit for bit.

    That of step 6 was saved with the data around the spike, deleted, and saved anew without them.
    """
    folders = [Path(each.run_dir, "checkpoints") for each in (config, expected)]
    for folder in folders:
        names = {entry.name for entry in folder.iterdir()} - {"rollbacks.json"}
        assert names == {"latest", *(f"step_{step}" for step in steps)}
        assert (folder / "latest").read_text() == f"step_{steps[-1]}\n"
    for step in steps:
        ours, theirs = (folder / f"step_{step}" for folder in folders)
        files = read_manifest(ours).files
        assert files.keys() == read_manifest(theirs).files.keys()
        for name in files:
            if name.endswith(".safetensors"):
                assert (ours / name).read_bytes() == (theirs / name).read_bytes(), (step, name)


DP2 = {"training__batch_size": 2}
BF16 = {"training__precision": "bf16"}
LAYOUTS = {
    "ZeRO-0": (1, 0, {}),
    "ZeRO-1 DP2": (2, 1, DP2),
    "ZeRO-3 DP2": (2, 3, DP2),
    "bf16": (1, 1, BF16),
    "PP2": (2, 1, {"parallel__pipeline": 2}),
    "mod": (1, 1, {"model": CASES["mod"].config.model_dump()}),
    "asynchronous saves": (2, 1, DP2 | {"checkpoint__asynchronous": True}),
    "muon ZeRO-0": (1, 0, {"training__optimizer": "muon"}),
    "muon bf16 DP2": (2, 1, DP2 | BF16 | {"training__optimizer": "muon"}),
    "bf16 offload": (1, offloading(1), BF16),
    "bf16 offload ZeRO-2 DP2": (2, offloading(2), DP2 | BF16),
    "bf16 offload ZeRO-3 DP2": (2, offloading(3), DP2 | BF16),
    "bf16 offload PP2": (2, offloading(1), BF16 | {"parallel__pipeline": 2}),
}


ORDINARY = {("ZeRO-0", 1), ("ZeRO-3 DP2", 4), ("PP2", 1), ("mod", 4), ("bf16 offload", 4)}


def _cases():
    for case in itertools.product(LAYOUTS, [1, 4]):
        yield pytest.param(*case, marks=[] if case in ORDINARY else [pytest.mark.slow])


@pytest.mark.parametrize(("layout", "log_interval"), _cases())
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
