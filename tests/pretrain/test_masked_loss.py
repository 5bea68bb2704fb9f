"""With masked labels a step is the same however its batch is cut: loss, norm and every gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from data_tools.batch import IGNORED_LABEL
from pretrain.config.deepspeed import resolve_ds_config
from pretrain.config.layout import check_layout
from pretrain.distributed import process_group
from pretrain.engine import build_engine
from pretrain.plan import RunPlan, build_context, build_precision
from pretrain.rendezvous import World
from pretrain.run import _train_loader
from tests.distributed import run_ranks
from tests.pretrain.tiny_run import tiny_run

SAMPLES = 8
NO_CLIPPING = {"training__grad_clip": 1e9}  # but the norm is computed

# world size, ZeRO stage, gradient accumulation, other settings
CUTS = {
    "accumulation 2": (1, 0, 2, {}),
    "accumulation 4": (1, 1, 4, {}),
    "data 2": (2, 1, 1, {}),
    "data 2, accumulation 4, ZeRO-2": (2, 2, 4, {}),
    "data 2, accumulation 2, ZeRO-3": (2, 3, 2, {}),
    "pipeline 2": (2, 1, 1, {"parallel__pipeline": 2}),
    "pipeline 2, accumulation 4": (2, 1, 4, {"parallel__pipeline": 2}),
    "pipeline 2 x data 2, accumulation 2": (4, 1, 2, {"parallel__pipeline": 2}),
}


def _config(data: Path, world_size: int, accumulation: int, **changes):
    data_size = world_size // changes.get("parallel__pipeline", 1)
    return tiny_run(
        data,
        data__reset_at_documents=True,
        training__batch_size=SAMPLES // accumulation // data_size,
        training__gradient_accumulation_steps=accumulation,
        **changes,
    )


def _step(config, stage: int) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, norm and gradients of the first step; a pipeline rank has those of its stage."""
    layout = check_layout(config, World.from_environment().size)
    zero = resolve_ds_config(f"configs/ds/zero{stage}.json", config, data_size=layout.data)
    with process_group() as device:
        ctx = build_context(config, precision=build_precision(config), device=device)
        engine = build_engine(RunPlan.of(config, zero, ctx))
        gradients: dict[str, torch.Tensor] = {}
        take_step = engine.deepspeed._take_model_step

        def capture(*args, **kwargs):
            from deepspeed.utils import safe_get_full_grad

            for name, parameter in engine.module.named_parameters():
                own = parameter.grad if stage == 0 else safe_get_full_grad(parameter)
                gradients[name] = own.detach().clone().flatten()
            return take_step(*args, **kwargs)

        engine.deepspeed._take_model_step = capture
        with _train_loader(config, layout, ctx) as loader:
            result = engine.train_step(loader, learning_rate=1e-3)
        return float(result.loss), float(result.grad_norm), gradients


@pytest.fixture(scope="module")
def whole(data):
    """One process, one micro-batch: a mean over all scored tokens without any bookkeeping."""
    config = _config(data, 1, 1, **NO_CLIPPING)
    (result,) = run_ranks(_step, 1, config, 0, init=False)
    return result


@pytest.mark.parametrize("cut", CUTS)
def test_a_step_with_masked_labels_is_the_same_at_every_cut(cut, data, whole):
    world_size, stage, accumulation, changes = CUTS[cut]
    config = _config(data, world_size, accumulation, **NO_CLIPPING, **changes)
    ranks = run_ranks(_step, world_size, config, stage, init=False)
    loss, norm, gradients = whole
    seen = set()
    for own_loss, own_norm, own in ranks:
        assert own_loss == pytest.approx(loss, rel=1e-5)
        assert own_norm == pytest.approx(norm, rel=1e-5)
        for name, gradient in own.items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-7, msg=name)
        seen |= own.keys()
    assert seen == gradients.keys()


def test_the_cuts_hold_different_numbers_of_scored_tokens(data):
    """Or the test above would hold for a mean over micro-batches as well."""
    from parallel.context import ParallelContext

    config = _config(data, 1, 4)
    with _train_loader(config, check_layout(config, 1), ParallelContext.single()) as loader:
        counts = [int((next(loader).labels != IGNORED_LABEL).sum()) for _ in range(4)]
    assert len(set(counts)) > 1
