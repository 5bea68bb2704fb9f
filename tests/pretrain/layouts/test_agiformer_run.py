"""Short real runs through a curriculum, each against the same run on one process."""

from __future__ import annotations

import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from models.checkpoint import load_model, open_checkpoint
from parallel.layer_state import persistent_buffers
from pretrain.config import ConfigError
from tests.distributed import run_ranks
from tests.models.agiformer.cases import THINKING, config_of
from tests.pretrain.layouts.equal_runs import assert_equal_runs
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import metrics, tiny_run
from tests.tiers import tiered
from tests.tolerance import FP32_NORM

CONFIG = config_of(**THINKING, init_std=0.1)
STAGES = [
    {"until_step": 1, "model": {"plasticity": 0.1}},
    {"until_step": 3, "model": {"plasticity": 0.5}},
    {"model": {"plasticity": 0.99}},
]
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "tensor 2": (2, 1, {"parallel__tensor": 2}),
    "tensor 2, sequence parallel": (
        2, 1, {"parallel__tensor": 2, "parallel__sequence_parallel": True},
    ),
    "pipeline 4, recomputed": (
        4, 1, {"parallel__pipeline": 4, "training__activation_recomputation": "full"},
    ),
    "data 2, ZeRO-3": (2, 3, {"training__batch_size": 2}),
}  # fmt: skip
TERMS = ("loss", "grad_norm", "ponder_loss", "ponder_steps", "first_byte_loss", "last_byte_loss")


def _train(data: Path, directory: Path, world_size: int = 1, zero: int = 0, **changes: Any):
    values = {"model": CONFIG.model_dump(), "training__lr": 1e-3, "data__stages": STAGES}
    config = tiny_run(data, run_dir=str(directory / "run"), **{**values, **changes})
    codes = run_ranks(run_training, world_size, config, f"configs/ds/zero{zero}.json", init=False)
    assert codes == [0] * world_size
    return metrics(config)


def _plasticities(directory: Path, step: int) -> set[float]:
    checkpoint = directory / "run" / "checkpoints" / f"step_{step}"
    buffers = persistent_buffers(load_model(open_checkpoint(checkpoint), device="cpu"))
    assert len(buffers) == CONFIG.num_layers
    return {round(float(alpha), 6) for alpha in buffers.values()}


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("reference")
    trained, evaluated = _train(data, directory)
    assert (_plasticities(directory, 2), _plasticities(directory, 4)) == ({0.5}, {0.99})
    # Of the places of a patch, at every one of which as many bytes are scored, or one more.
    bits = [evaluated[-1][f"bits_of_byte_{k + 1}"] for k in range(CONFIG.patch_size)]
    whole = evaluated[-1]["eval_loss"] / math.log(2)
    assert statistics.fmean(bits) == pytest.approx(whole, rel=0.01)
    assert len(set(bits)) == CONFIG.patch_size
    return trained, evaluated


@pytest.mark.parametrize(
    "layout", tiered(LAYOUTS, ["tensor 2, sequence parallel", "pipeline 4, recomputed"])
)
def test_a_run_is_the_same_at_any_layout(layout, data, reference, tmp_path):
    world_size, zero, changes = LAYOUTS[layout]
    run = _train(data, tmp_path, world_size, zero, **changes)
    assert_equal_runs(run, reference, TERMS)
    assert _plasticities(tmp_path, 4) == {0.99}


def test_a_run_goes_on_at_another_layout_with_the_plasticity_of_its_stage(
    data, reference, tmp_path
):
    _train(data, tmp_path, 2, 1, parallel__pipeline=2)
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step_4")
    (checkpoints / "latest").write_text("step_2\n")
    assert _plasticities(tmp_path, 2) == {0.5}
    resumed, _ = _train(data, tmp_path, 2, 1, parallel__tensor=2)
    losses = [record["loss"] for record in reference[0]]
    assert [r["loss"] for r in resumed[-2:]] == pytest.approx(losses[-2:], rel=FP32_NORM)
    assert _plasticities(tmp_path, 4) == {0.99}


def test_plasticity_decides_the_losses_of_a_stage(data, reference, tmp_path):
    trained, _ = _train(data, tmp_path, data__stages=[], training__max_steps=2)
    # Exactly: the two runs differ in nothing else, and what does not differ has equal bits.
    assert trained[0]["loss"] != reference[0][0]["loss"]


def test_a_stage_with_a_value_that_cannot_be_is_refused_at_load(data):
    stages = [{"until_step": 1, "model": {"plasticity": 1.5}}, {}]
    message = r"data\.stages\.0\.model\.plasticity=1\.5 must be less than or equal to 1; change"
    with pytest.raises(ConfigError, match=message):
        tiny_run(data, model=CONFIG.model_dump(), data__stages=stages)
