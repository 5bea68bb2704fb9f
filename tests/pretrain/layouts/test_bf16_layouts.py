"""In bf16, data ranks and stages give the gradients of one process with the same micro-batches.

They multiply the same shapes, so that only sums over ranks could differ, and these are in fp32: the
bound is that of fp32. Tensor ranks sum activations in bf16; how far these are is in
tests/benchmarks/RESULTS.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from pretrain.config import RunConfig
from tests.distributed import run_ranks
from tests.models.families import CASES
from tests.pretrain.first_step import FirstStep, first_step
from tests.pretrain.tiny_run import tiny_run
from tests.tiers import tiered
from tests.tolerance import FP32_LOSS, FP32_NORM, assert_close

ROWS, SEQUENCES = 2, 8
MODELS = {
    # A pipeline names both copies of a tied matrix.
    "daria_former": CASES["daria_former"].config.model_copy(update={"weight_tying": False}),
    **{name: CASES[name].config for name in ("llama", "mod", "agiformer")},
}
# world size, settings
LAYOUTS = {
    "data 2": (2, {"training__gradient_accumulation_steps": 2}),
    "data 4": (4, {"training__gradient_accumulation_steps": 1}),
    "pipeline 2 x data 2": (
        4,
        {"parallel__pipeline": 2, "training__gradient_accumulation_steps": 2},
    ),
}
COMBINATIONS = [(name, layout) for name in MODELS for layout in LAYOUTS]
ORDINARY = [("llama", "data 2"), ("mod", "pipeline 2 x data 2")]


def _config(data: Path, name: str, **changes) -> RunConfig:
    return tiny_run(
        data,
        model=MODELS[name].model_dump(),
        training__precision="bf16",
        training__batch_size=ROWS,
        training__grad_clip=1e9,
        **changes,
    )


def _alone(data: Path, name: str) -> FirstStep:
    config = _config(data, name, training__gradient_accumulation_steps=SEQUENCES // ROWS)
    return run_ranks(first_step, 1, config, 1, init=False)[0]


@pytest.mark.parametrize(("name", "layout"), tiered(COMBINATIONS, ORDINARY))
def test_gradients_equal_those_of_one_process_within_the_bound_of_fp32(name, layout, data):
    world_size, changes = LAYOUTS[layout]
    alone, eps = _alone(data, name), torch.finfo(torch.float32).eps
    seen = set()
    for own in run_ranks(first_step, world_size, _config(data, name, **changes), 1, init=False):
        assert own.loss == pytest.approx(alone.loss, rel=FP32_LOSS)
        assert own.norm == pytest.approx(alone.norm, rel=FP32_NORM)
        for parameter, gradient in own.gradients.items():
            expected = alone.gradients[parameter]
            assert_close(gradient, expected, FP32_NORM, parameter, floor=eps * alone.norm)
        seen |= own.gradients.keys()
    assert seen == alone.gradients.keys()


def test_gradients_summed_in_bf16_are_beyond_that_bound(data, tmp_path):
    """Or the test above would not see in which precision ranks sum."""
    alone = _alone(data, "llama")
    file = tmp_path / "bf16_sums.json"
    zero = {"zero_optimization": {"stage": 1}, "communication_data_type": "bf16"}
    file.write_text(json.dumps(zero))
    config = _config(data, "llama", **LAYOUTS["data 2"][1])
    own, _ = run_ranks(first_step, 2, config, 1, str(file), init=False)
    errors = {n: (own.gradients[n] - g).norm() / g.norm() for n, g in alone.gradients.items()}
    assert max(errors.values()) > 10 * FP32_NORM
