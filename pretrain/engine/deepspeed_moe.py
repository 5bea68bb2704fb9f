"""Registration of expert-parallel parameters with DeepSpeed.

DeepSpeed (0.19.8) reduces, partitions, clips and counts such parameters by itself once three things
are in place: attributes of the parameter, process groups under a name, and an engine with
`has_moe_layers`. It detects only its own MoE layer class, so the flag is set here.
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
    """Name of the expert groups, from which DeepSpeed parses the size."""
    return f"ep_size_{ctx.expert.size}"


def register_experts(module: nn.Module, ctx: ParallelContext) -> None:
    """Mark the experts of a model, and register the expert groups with DeepSpeed.

    Expert gradients are then summed over the data ranks that hold the same experts and divided by
    the number of all data ranks, whose tokens the experts saw; optimizer state is partitioned over
    the former. At expert size 1 experts are parameters like any other.

    Raises:
        ConfigError: a pipeline stage has no experts (on every rank).
    """
    if ctx.expert.size == 1:
        return
    from deepspeed.utils import groups

    name = group_name(ctx)
    groups._EXPERT_PARALLEL_GROUP[name] = ctx.expert.group
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = ctx.expert_data.group
    # Otherwise the norm of bf16 gradients covers only one tensor rank's columns.
    groups.expert_tensor_parallel_world_size = ctx.tensor.size
    experts = [p for n, p in module.named_parameters() if sharding_of(n, p).experts is not None]
    _check_stages(len(experts), ctx)
    for parameter in experts:
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = name  # type: ignore[attr-defined]


def _check_stages(num_parameters: int, ctx: ParallelContext) -> None:
    """Refuse stages without experts: they would miss the all-reduce of the expert norms."""
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
    """Context in which new engines treat the model as MoE if the layout has expert ranks."""
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
    """Context in which an engine saves and loads experts as ordinary parameters.

    DeepSpeed's expert files require its own layer class. The weights file then holds only the
    experts of the first expert rank; those of each rank are in its optimizer shard, from which
    `restore_experts` restores them.
    """
    found, engine.has_moe_layers = engine.has_moe_layers, False
    try:
        yield
    finally:
        engine.has_moe_layers = found


def restore_experts(engine: Any) -> None:
    """Restore this rank's experts from their masters, after loading (collective)."""
    if engine.has_moe_layers:
        engine.optimizer.update_lp_params()
