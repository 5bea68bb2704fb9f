"""Runs with emulated FP8: at a layout of 4 ranks as alone, saved there and continued alone."""

from __future__ import annotations

from typing import Any

import pytest

from parallel.context import Axis, ParallelContext
from pretrain.config import RunConfig
from pretrain.config.deepspeed import resolve_ds_config
from pretrain.engine.train_spec import TrainSpec, build_precision, check_model
from pretrain.errors import ConfigError
from tests.models.families import CASES
from tests.pretrain.layout import Layout
from tests.pretrain.layouts.layout_runs import (
    LAYOUTS,
    SAVED,
    STEPS,
    Origin,
    assert_same_state,
    begin_at_checkpoint,
    saved_again,
    tail,
    train,
)
from tests.pretrain.tiny_run import tiny_run, write_data
from tests.refusals import assert_refused
from tests.tolerance import BF16_LOSS, BF16_NORM

# Shards of two tensor ranks are whole blocks of mxfp8.
MODEL = CASES["llama"].config.model_copy(
    update={"hidden_size": 128, "intermediate_size": 128, "num_kv_heads": 4, "init_std": 0.1}
)
FP8 = {
    "training__precision": "fp8",
    "training__fp8_recipe": "mxfp8",
    "training__fp8_backend": "emulated",
}
BF16 = {
    "training__precision": "bf16",
    "training__fp8_recipe": None,
    "training__fp8_backend": "transformer_engine",
}


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Origin:
    run_dir = tmp_path_factory.mktemp("fp8") / "run"
    write_data(run_dir.parent)
    config = _config(run_dir, LAYOUTS["PP2 TP2"])
    train(config, LAYOUTS["PP2 TP2"])
    return Origin(run_dir, *tail(config))


def _config(run_dir, place: Layout, **changes: Any) -> RunConfig:
    return tiny_run(
        run_dir.parent,
        run_dir=str(run_dir),
        model=MODEL.model_dump(),
        training__max_steps=STEPS,
        checkpoint__interval=SAVED,
        evaluation__interval=STEPS,
        **place.changes,
        **FP8 | changes,
    )


def test_a_run_goes_on_alone_with_the_same_state_and_losses(origin):
    """Its scales are no state, so that its checkpoint is that of a run in bf16, at any layout."""
    run_dir = origin.run_dir.parent / "alone"
    begin_at_checkpoint(origin, run_dir)
    config = _config(run_dir, LAYOUTS["ZeRO-1"])
    train(config, LAYOUTS["ZeRO-1"], saved_again)
    assert_same_state(run_dir / "copy", run_dir / "checkpoints" / f"step_{SAVED}")
    curve, evaluation = tail(config)
    for expected, found in zip(origin.curve, curve, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=BF16_LOSS)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=BF16_NORM)
    assert evaluation == pytest.approx(origin.evaluation, rel=BF16_LOSS)


@pytest.mark.parametrize(
    ("changes", "tensor", "refusal"),
    [
        (
            {"model": MODEL.model_dump() | {"intermediate_size": 160}},
            2,
            ("FP8 linear", 128, ("80", "mxfp8", "32"), "parallel.tensor"),
        ),
        (
            {"training__batch_size": 3, "data__sequence_length": 17},
            1,
            ("training.batch_size", 3, ("17", "51 rows", "32"), "training.batch_size"),
        ),
        (
            {
                "model": CASES["daria_former_lora"].config.model_dump(),
                "training__fp8_recipe": "tensorwise",
            },
            1,
            ("lora_rank", 3, "precision=fp8", "lora_rank=0"),
        ),
    ],
)
def test_what_fp8_cannot_multiply_is_refused_before_a_rank_builds_it(
    changes, tensor, refusal, tmp_path
):
    config = tiny_run(
        tmp_path, parallel__tensor=tensor, **{"model": MODEL.model_dump()} | FP8 | changes
    )
    ctx = ParallelContext(tensor=Axis(size=tensor), precision=build_precision(config))
    spec = TrainSpec.of(config, resolve_ds_config(None, config, data_size=1), ctx)
    with assert_refused(*refusal, error=ConfigError):
        check_model(spec)


def test_eight_bits_are_seen_in_the_loss(origin):
    config = _config(origin.run_dir.parent / "bf16", LAYOUTS["ZeRO-1"], **BF16)
    train(config, LAYOUTS["ZeRO-1"])
    curve, _ = tail(config)
    differences = [a["loss"] / b["loss"] - 1 for a, b in zip(curve, origin.curve, strict=True)]
    assert max(map(abs, differences)) > 1e-4
