"""Measurements of a run's first step, with the gradients that reach its optimizer."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from parallel.context import ParallelContext
from parallel.sharding import Sharding, merge, sharding_of
from pretrain.config import RunConfig
from pretrain.config.deepspeed import resolve_ds_config
from pretrain.config.layout import check_layout
from pretrain.distributed.process_groups import process_group
from pretrain.distributed.rendezvous import World
from pretrain.engine.build import build_engine
from pretrain.engine.engine import Engine
from pretrain.engine.train_spec import TrainSpec, build_context, build_precision
from pretrain.run_data import open_training_data


class FirstStep(NamedTuple):
    """Its gradients are whole, by name; a pipeline rank has those of its stage."""

    loss: float
    norm: float
    terms: dict[str, float]
    gradients: dict[str, torch.Tensor]


def first_step(config: RunConfig, stage: int, ds_config: str | None = None) -> FirstStep:
    """Take the first step of `config` on each of its ranks.

    Under `ds_config`, which is configs/ds/zero{stage}.json unless given.
    """
    layout = check_layout(config, World.from_environment().size)
    path = ds_config or f"configs/ds/zero{stage}.json"
    settings = resolve_ds_config(path, config, data_size=layout.data)
    with process_group() as device:
        ctx = build_context(config, precision=build_precision(config), device=device)
        engine = build_engine(TrainSpec.of(config, settings, ctx))
        gradients = captured_gradients(engine, ctx, stage=stage)
        with open_training_data(config, ctx.data) as loader:
            result = engine.train_step(loader, learning_rate=1e-3)
        terms = {name: float(term) for name, term in result.terms.items()}
        return FirstStep(float(result.loss), float(result.grad_norm), terms, gradients)


def captured_gradients(
    engine: Engine, ctx: ParallelContext, *, stage: int
) -> dict[str, torch.Tensor]:
    """Where the gradients of every step that follows are put, whole and unclipped, by name."""
    gradients: dict[str, torch.Tensor] = {}
    take_step = engine._deepspeed._take_model_step

    def capture(*args, **kwargs):
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in engine.module.named_parameters():
            own = parameter.grad if stage == 0 else safe_get_full_grad(parameter)
            shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 it is in parts
            own = own.detach().view(shape).contiguous()
            gradients[name] = _whole(own, sharding_of(name, parameter), ctx)
        return take_step(*args, **kwargs)

    engine._deepspeed._take_model_step = capture
    return gradients


def _whole(gradient: torch.Tensor, sharding: Sharding, ctx: ParallelContext) -> torch.Tensor:
    shards = [gradient]
    if ctx.tensor.size > 1:
        shards = [torch.empty_like(gradient) for _ in range(ctx.tensor.size)]
        dist.all_gather(shards, gradient, group=ctx.tensor.group)
    return merge(shards, sharding).clone()
