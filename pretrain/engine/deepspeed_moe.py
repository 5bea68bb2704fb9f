"""What DeepSpeed has to know about parameters that expert ranks share.

DeepSpeed (0.19.8) reduces, partitions, clips and counts such parameters by itself once three things
are in place: attributes of the parameter, process groups under a name, and an engine that has
found layers of experts. It looks for its own layer class alone, and so it is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.context import ParallelContext
from parallel.sharding import sharding_of
from pretrain.errors import ConfigError


def group_name(ctx: ParallelContext) -> str:
    """The name of the expert groups; DeepSpeed reads the size out of it."""
    return f"ep_size_{ctx.expert.size}"


def register_experts(module: nn.Module, ctx: ParallelContext) -> None:
    """Mark the experts of a model, and give DeepSpeed the groups of the layout.

    Its gradients then are summed over the data ranks that hold the same experts and divided by the
    number of all data ranks, whose tokens came to them; its optimizer state is partitioned over the
    former. At expert size 1 they are parameters like any other.

    Raises:
        ConfigError: a pipeline stage has no experts (on every rank).
    """
    if ctx.expert.size == 1:
        return
    from deepspeed.utils import groups

    name = group_name(ctx)
    groups._EXPERT_PARALLEL_GROUP[name] = ctx.expert.group
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = ctx.expert_data.group
    # Otherwise the norm of bf16 gradients leaves out all tensor ranks but one's columns.
    groups.expert_tensor_parallel_world_size = ctx.tensor.size
    experts = [p for n, p in module.named_parameters() if sharding_of(n, p).experts is not None]
    _check_stages(len(experts), ctx)
    for parameter in experts:
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = name  # type: ignore[attr-defined]


def _check_stages(num_parameters: int, ctx: ParallelContext) -> None:
    """DeepSpeed adds the norms of experts up over stages: one that has none would not take part."""
    fewest = torch.tensor(num_parameters, device=ctx.device)
    dist.all_reduce(fewest, op=dist.ReduceOp.MIN, group=ctx.pipeline.group)
    if fewest == 0:
        raise ConfigError(
            f"parallel.expert={ctx.expert.size} with parallel.pipeline={ctx.pipeline.size}: "
            "a stage has no layer with experts; use fewer stages or parallel.expert=1"
        )


def is_shared_by_expert_ranks(parameter: Tensor) -> bool:
    """Whether `register_experts` has marked the parameter."""
    return not getattr(parameter, "allreduce", True)


@contextmanager
def patched_moe_detection(ctx: ParallelContext) -> Iterator[None]:
    """Engines that are made in here take the model for one with experts, where it has some."""
    if ctx.expert.size == 1:
        yield
        return
    from deepspeed.runtime.engine import DeepSpeedEngine

    original = DeepSpeedEngine._configure_distributed_model

    def configure(self: Any, model: nn.Module) -> None:
        self.has_moe_layers = True
        original(self, model)

    DeepSpeedEngine._configure_distributed_model = configure
    try:
        yield
    finally:
        DeepSpeedEngine._configure_distributed_model = original


@contextmanager
def without_moe_checkpoint_files(engine: Any) -> Iterator[None]:
    """While its state is saved or loaded, an engine takes the experts for ordinary parameters.

    DeepSpeed's files of experts are those of its own layer class. The file of weights now has the
    experts of the first expert rank alone; those of each rank are in its optimizer shard, from
    where `restore_experts` puts them back.
    """
    found, engine.has_moe_layers = engine.has_moe_layers, False
    try:
        yield
    finally:
        engine.has_moe_layers = found


def restore_experts(engine: Any) -> None:
    """After loading: the weights of this rank's experts from their master copies (collective)."""
    if engine.has_moe_layers:
        engine.optimizer.update_lp_params()
