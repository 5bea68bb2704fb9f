"""Short real runs of the dynamic families, each against the same run on one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from models.base import TokenInputs
from models.checkpoint import load_model, open_checkpoint
from parallel.carry import SequentialModel
from parallel.context import Axis, ParallelContext
from parallel.layer_state import persistent_buffers
from pretrain.config.deepspeed import resolve_ds_config
from pretrain.engine.train_spec import TrainSpec, check_model
from tests.distributed import run_ranks
from tests.models.families import CASES
from tests.pretrain.layouts.equal_runs import assert_equal_runs
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import SEQ, metrics, tiny_run
from tests.refusals import assert_refused
from tests.tiers import tiered
from tests.tolerance import FP32_NORM

LAYOUTS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "data 2, ZeRO-3": ("dtf", 2, 3, {"training__batch_size": 2}),
    "tensor 2, sequence parallel": (
        "dtf", 2, 1, {"parallel__tensor": 2, "parallel__sequence_parallel": True},
    ),
    "pipeline 2, recomputed": (
        "dtf", 2, 1, {"parallel__pipeline": 2, "training__activation_recomputation": "full"},
    ),
    "accumulation 4": (
        "mod", 1, 0, {"training__batch_size": 2, "training__gradient_accumulation_steps": 4},
    ),
    "pipeline 2 x tensor 2 x data 2": (
        "mod", 8, 1, {"parallel__pipeline": 2, "parallel__tensor": 2, "training__batch_size": 2},
    ),
}  # fmt: skip


def _taus(model: SequentialModel) -> dict[str, torch.Tensor]:
    return {k: v for k, v in persistent_buffers(model).items() if k.endswith(".tau")}


def _train(data: Path, directory: Path, name: str, world_size: int, stage: int, **changes: Any):
    changes = {"model": CASES[name].config.model_dump(), "training__lr": 1e-3, **changes}
    config = tiny_run(data, run_dir=str(directory / "run"), **changes)
    codes = run_ranks(run_training, world_size, config, f"configs/ds/zero{stage}.json", init=False)
    assert codes == [0] * world_size
    return metrics(config), _loaded(directory)


def _loaded(directory: Path) -> SequentialModel:
    return load_model(open_checkpoint(directory / "run"), device="cpu")


class Reference(NamedTuple):
    directory: Path
    metrics: tuple[list[dict[str, float]], list[dict[str, float]]]
    model: SequentialModel


@pytest.fixture(scope="module")
def references(data, tmp_path_factory) -> dict[str, Reference]:
    directories = {name: tmp_path_factory.mktemp(name) for name in ("dtf", "mod")}
    return {
        name: Reference(directory, *_train(data, directory, name, 1, 0))
        for name, directory in directories.items()
    }


@pytest.mark.parametrize(
    "layout", tiered(LAYOUTS, ["data 2, ZeRO-3", "pipeline 2 x tensor 2 x data 2"])
)
def test_a_run_is_the_same_at_any_layout_and_so_are_its_thresholds(
    layout, data, references, tmp_path
):
    name, world_size, stage, changes = LAYOUTS[layout]
    run, model = _train(data, tmp_path, name, world_size, stage, **changes)
    _, expected, reference = references[name]
    terms = ("loss", "grad_norm", "causal_recall", *(["prior_loss"] if name == "dtf" else []))
    assert_equal_runs(run, expected, terms)
    taus, expected_taus = persistent_buffers(model), persistent_buffers(reference)
    assert len(taus) == 2 * CASES[name].config.num_routed  # tau and its offset
    for key, tau in expected_taus.items():
        assert tau.isfinite()
        torch.testing.assert_close(taus[key], tau, rtol=FP32_NORM, atol=FP32_NORM)


@pytest.mark.parametrize("layout", tiered(["whole", "pipeline 2"], ["pipeline 2"]))
def test_a_run_that_goes_on_from_a_checkpoint_goes_on_with_its_thresholds(layout, data, tmp_path):
    cut = {"parallel__pipeline": 2}
    world_size, stage, changes = (1, 0, {}) if layout == "whole" else (2, 1, cut)
    (through, _), model = _train(data, tmp_path, "dtf", world_size, stage, **changes)
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step_4")
    (checkpoints / "latest").write_text("step_2\n")
    halfway = persistent_buffers(_loaded(tmp_path))
    (resumed, _), again = _train(data, tmp_path, "dtf", world_size, stage, **changes)
    assert [r["loss"] for r in resumed[-2:]] == [r["loss"] for r in through[-2:]]
    for key, tau in persistent_buffers(model).items():
        assert torch.equal(persistent_buffers(again)[key], tau)
        assert not torch.equal(halfway[key], tau)


def test_training_begins_with_the_thresholds_of_another_run_at_another_layout(
    data, references, tmp_path
):
    directory, _, reference = references["dtf"]
    changes = {
        "training__init_from": str(directory / "run"), "training__max_steps": 1,
        "training__warmup_steps": 0, "parallel__tensor": 2, "parallel__pipeline": 2,
    }  # fmt: skip
    _, model = _train(data, tmp_path, "dtf", 4, 1, **changes)
    for key, tau in _taus(reference).items():
        moved = (persistent_buffers(model)[key] - tau).abs()
        assert 0 < moved < 0.02 * tau.abs()  # by (1 - tau_momentum) of the way to another value


def test_bf16_keeps_thresholds_in_fp32_and_a_stored_model_routes_by_them(data, tmp_path):
    precision = {"training__precision": "bf16"}
    _, model = _train(data, tmp_path, "mod", 2, 1, parallel__pipeline=2, **precision)
    assert {buffer.dtype for buffer in persistent_buffers(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    tokens = torch.arange(2 * SEQ).reshape(2, SEQ) % 61
    cache = model.new_cache(2, SEQ)
    with torch.no_grad():
        model(TokenInputs(tokens), cache)
    kept = cache["layer_1"].counts
    assert ((kept > 0) & (kept < SEQ)).all()


def test_more_stages_than_pairs_and_ends_are_refused(data):
    model = CASES["dtf"].config.model_copy(update={"num_layers": 8}).model_dump()
    config = tiny_run(data, model=model, parallel__pipeline=8)
    ds_config = resolve_ds_config("configs/ds/zero1.json", config, data_size=1)
    spec = TrainSpec.of(config, ds_config, ParallelContext(pipeline=Axis(size=8)))
    with assert_refused("parallel.pipeline", 8, "6 layers", "parallel.pipeline to 6"):
        check_model(spec)
