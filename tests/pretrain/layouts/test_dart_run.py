"""Short real runs with noise, each against the same run on one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from tests.distributed import run_ranks
from tests.models.dart.cases import config_of
from tests.pretrain.layouts.equal_runs import assert_equal_runs
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import metrics, tiny_run
from tests.tiers import tiered
from tests.tolerance import FP32_NORM

CONFIG = config_of(p_uncond=0.1, init_std=0.1)
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "tensor 2": (2, 1, {"parallel__tensor": 2}),
    "pipeline 4": (4, 1, {"parallel__pipeline": 4}),
    "data 2, ZeRO-3": (2, 3, {"training__batch_size": 2}),
}
TERMS = ("loss", "grad_norm", "lm_loss", "diffusion_loss", "draft_loss")


def _train(data: Path, directory: Path, world_size: int = 1, zero: int = 0, **changes: Any):
    values = {"model": CONFIG.model_dump(), "training__lr": 1e-3}
    config = tiny_run(data, run_dir=str(directory / "run"), **{**values, **changes})
    codes = run_ranks(run_training, world_size, config, f"configs/ds/zero{zero}.json", init=False)
    assert codes == [0] * world_size
    return metrics(config)


def _lose_the_last_save(directory: Path) -> None:
    """What a run that is killed after its step 3 leaves behind."""
    checkpoints = directory / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step_4")
    (checkpoints / "latest").write_text("step_2\n")


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    trained, evaluated = _train(data, tmp_path_factory.mktemp("reference"))
    assert all(record["diffusion_loss"] > 0 < record["draft_loss"] for record in trained)
    return trained, evaluated


@pytest.mark.parametrize("layout", tiered(LAYOUTS, ["tensor 2", "pipeline 4"]))
def test_a_run_has_the_same_noise_and_losses_at_any_layout(layout, data, reference, tmp_path):
    world_size, zero, changes = LAYOUTS[layout]
    run = _train(data, tmp_path, world_size, zero, **changes)
    assert_equal_runs(run, reference, TERMS)


def test_a_run_that_is_resumed_has_the_noise_and_losses_of_one_that_is_not(
    data, reference, tmp_path
):
    """Bit for bit at the same layout, and at another."""
    _train(data, tmp_path / "same")
    _lose_the_last_save(tmp_path / "same")
    again, _ = _train(data, tmp_path / "same")
    for term in TERMS:
        assert [r[term] for r in again[-2:]] == [r[term] for r in reference[0][-2:]], term
    _train(data, tmp_path / "other", 2, 1, parallel__pipeline=2)
    _lose_the_last_save(tmp_path / "other")
    resumed, _ = _train(data, tmp_path / "other", 2, 1, parallel__tensor=2)
    for term in TERMS:
        values = [record[term] for record in reference[0]][-2:]
        assert [r[term] for r in resumed[-2:]] == pytest.approx(values, rel=FP32_NORM), term
