"""With masked labels a step is the same however its batch is cut: loss, its terms, norm and every
gradient. Each step has a z-loss, too."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from data_tools.batch import IGNORED_LABEL
from models.base import TokenInputs
from models.registry import get_family
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from parallel.sharding import Sharding, merge, sharding_of
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
Z_LOSS = 0.05
SETTINGS = {
    "training__grad_clip": 1e9,  # clips nothing, but the norm is computed
    "training__z_loss": Z_LOSS,
}

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
    "tensor 2, accumulation 2": (2, 1, 2, {"parallel__tensor": 2}),
    "pipeline 2 x tensor 2": (4, 1, 2, {"parallel__pipeline": 2, "parallel__tensor": 2}),
}


class Step(NamedTuple):
    """What the first step measured; a pipeline rank has the gradients of its stage."""

    loss: float
    terms: dict[str, float]
    norm: float
    gradients: dict[str, torch.Tensor]


def _config(data: Path, world_size: int, accumulation: int, **changes):
    model_size = changes.get("parallel__pipeline", 1) * changes.get("parallel__tensor", 1)
    data_size = world_size // model_size
    return tiny_run(
        data,
        data__reset_at_documents=True,
        training__batch_size=SAMPLES // accumulation // data_size,
        training__gradient_accumulation_steps=accumulation,
        **changes,
    )


def _step(config, stage: int) -> Step:
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
                shape = getattr(parameter, "ds_shape", parameter.shape)
                gradients[name] = _whole(own.view(shape), sharding_of(name, parameter), ctx)
            return take_step(*args, **kwargs)

        engine.deepspeed._take_model_step = capture
        with _train_loader(config, layout, ctx) as loader:
            result = engine.train_step(loader, learning_rate=1e-3)
        terms = {name: float(term) for name, term in result.terms.items()}
        return Step(float(result.loss), terms, float(result.grad_norm), gradients)


def _whole(gradient: torch.Tensor, sharding: Sharding, ctx: ParallelContext) -> torch.Tensor:
    shards = [gradient.detach().contiguous()]
    if ctx.tensor.size > 1:
        shards = [torch.empty_like(shards[0]) for _ in range(ctx.tensor.size)]
        dist.all_gather(shards, gradient.detach().contiguous(), group=ctx.tensor.group)
    return merge(shards, sharding).clone()


@pytest.fixture(scope="module")
def whole(data):
    """One process, one micro-batch: a mean over all scored tokens without any bookkeeping."""
    config = _config(data, 1, 1, **SETTINGS)
    (result,) = run_ranks(_step, 1, config, 0, init=False)
    return result


@pytest.mark.parametrize("cut", CUTS)
def test_a_step_with_masked_labels_is_the_same_at_every_cut(cut, data, whole):
    world_size, stage, accumulation, changes = CUTS[cut]
    config = _config(data, world_size, accumulation, **SETTINGS, **changes)
    ranks = run_ranks(_step, world_size, config, stage, init=False)
    seen = set()
    for own in ranks:
        assert own.loss == pytest.approx(whole.loss, rel=1e-5)
        assert own.terms == pytest.approx(whole.terms, rel=1e-5)
        assert own.norm == pytest.approx(whole.norm, rel=1e-5)
        for name, gradient in own.gradients.items():
            expected = whole.gradients[name]
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7, msg=name)
        seen |= own.gradients.keys()
    assert seen == whole.gradients.keys()


def test_loss_and_gradients_are_those_of_the_equations_in_fp64(data, whole):
    config, ctx = _config(data, 1, 1), ParallelContext.single()
    specs = get_family("llama").layer_specs(config.model, segmented=True)
    model = SequentialModel(specs, ctx, seed=config.training.seed)
    with _train_loader(config, check_layout(config, 1), ctx) as loader:
        batch = next(loader)
    logits = model(TokenInputs(batch.tokens, batch.segment_ids)).transpose(0, 1).double()
    log_z = logits.exp().sum(dim=-1).log()
    scored = batch.labels != IGNORED_LABEL
    own = logits.gather(-1, batch.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    lm_loss, z_loss = (log_z - own)[scored].mean(), log_z[scored].square().mean()
    (lm_loss + Z_LOSS * z_loss).backward()
    assert whole.terms == pytest.approx({"lm_loss": lm_loss.item(), "z_loss": z_loss.item()})
    assert whole.loss == pytest.approx(lm_loss.item() + Z_LOSS * z_loss.item())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole.gradients[name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_the_cuts_hold_different_numbers_of_scored_tokens(data):
    """Or the test above would hold for a mean over micro-batches as well."""
    config = _config(data, 1, 4)
    with _train_loader(config, check_layout(config, 1), ParallelContext.single()) as loader:
        counts = [int((next(loader).labels != IGNORED_LABEL).sum()) for _ in range(4)]
    assert len(set(counts)) > 1
