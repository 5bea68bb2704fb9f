"""Saving and restoring of masters, moments and step counts, at the same or another layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parallel.carry import canonical_names
from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.weight_slices import WeightSlices
from parallel.checkpoint.weights import Weight
from parallel.context import ParallelContext
from parallel.layer_state import persistent_buffers
from parallel.sharding import Sharding, local_shape, sharding_of
from pretrain.checkpointing.index import FOLDER, CheckpointIndex, FlatRange
from pretrain.checkpointing.optimizer_shards import (
    MASTER,
    MOMENTS,
    OptimizerShard,
    StoredOptimizer,
    Wanted,
)
from pretrain.engine.deepspeed_optimizer import (
    Fragment,
    OptimizerView,
    ParamSlice,
    ShardLocation,
)
from pretrain.engine.partitions import local_shard


def optimizer_shard(engine: Any, *, ctx: ParallelContext) -> OptimizerShard:
    """The elements that this rank updates, loaded one by one; not collective.

    Replicas are written by one of the ranks that hold them.
    """
    live = OptimizerView(engine, data_size=ctx.data.size, expert_rank=ctx.expert.rank)
    ranges: dict[str, FlatRange] = {}
    elements: list[Weight] = []
    weights: list[Weight] = []
    for index, fragment in enumerate(live.fragments):
        if not _is_writer(fragment, index, ctx):
            continue
        name, shape, location = fragment.name, (fragment.length,), fragment.location
        ranges[name] = _flat_range(fragment, live.step(fragment), ctx)
        for key in (MASTER, *MOMENTS):
            load = partial(live.value, fragment, key)
            elements.append(Weight(f"{name}/{key}", shape, torch.float32, Sharding(), load))
        if location.weight.data_ptr() != location.master.data_ptr():
            load = partial(_weight, location)
            weights.append(Weight(name, shape, location.weight.dtype, Sharding(), load))
    return OptimizerShard(elements, weights, ranges)


def _weight(location: ShardLocation) -> Tensor:
    return location.weight


def _is_writer(fragment: Fragment, index: int, ctx: ParallelContext) -> bool:
    """Whether this rank writes elements replicated over tensor, data (ZeRO-0) or stage ranks."""
    if fragment.is_tied_copy or (fragment.sharding.dim is None and ctx.tensor.rank > 0):
        return False
    copies = fragment.location.copies
    return copies == 1 or index % copies == ctx.data.rank


def _flat_range(fragment: Fragment, step: int, ctx: ParallelContext) -> FlatRange:
    return FlatRange(
        shape=fragment.shape,
        dim=fragment.sharding.dim,
        full_size=fragment.sharding.full_size,
        shard=ctx.tensor.rank,
        num_shards=ctx.tensor.size,
        start=fragment.location.start,
        length=fragment.length,
        step=step,
    )


@torch.no_grad()
def restore_optimizer_state(
    engine: Any,
    directory: Path,
    index: CheckpointIndex,
    *,
    ctx: ParallelContext,
    progress: Callable[[str], object],
) -> None:
    """Fill this rank's weights, masters, moments and step counts from a checkpoint of any layout.

    Opens each file that holds something of it once; at the layout that wrote them these are its own
    and, for what is replicated, that of the rank that wrote it for all. Not collective;
    `publish_weights` follows once every rank has succeeded.

    Args:
        progress: called with the name of each file before it is read.

    Raises:
        CheckpointError, WeightsError: a parameter is missing, incomplete or of another shape.
    """
    live = OptimizerView(engine, data_size=ctx.data.size, expert_rank=ctx.expert.rank)
    stored = StoredOptimizer(directory / FOLDER, index.optimizer)
    for slices in live.slices.values():
        for each in slices:
            _check_slice(each, stored)
    _init_states(live, stored)
    wanted = [
        Wanted(
            fragment.name,
            fragment.location.start,
            {key: live.value(fragment, key) for key in (MASTER, *MOMENTS)},
        )
        for fragment in live.fragments
    ]
    stored.read(wanted, tensor=ctx.tensor, progress=progress)
    for fragment in live.fragments:
        fragment.location.weight.copy_(fragment.location.master)
    with WeightSlices(directory / "weights", index.weights, tensor=ctx.tensor) as weights:
        _restore_untrained(engine.module, weights, ctx)


def _check_slice(each: ParamSlice, stored: StoredOptimizer) -> None:
    """Compare the declared shape and sharding with those in the checkpoint."""
    name, sharding, found = each.name, each.sharding, stored.parameter(each.name)
    shape = list(each.shape)
    if sharding.dim is not None:
        shape[sharding.dim] = sharding.extent
    if (tuple(shape), sharding.dim) != (found.shape, found.sharding.dim):
        raise CheckpointError(
            f"{str(stored.directory)!r}: parameter {name!r} has shape {list(found.shape)}, cut "
            f"along {found.sharding.dim}, the model {shape}, cut along {sharding.dim}: it is of "
            "another model; resume with the configuration that wrote it"
        )


def _init_states(live: OptimizerView, stored: StoredOptimizer) -> None:
    """Create the optimizer states; parameters in one flat tensor must share a step count."""
    counts: dict[Tensor, tuple[str, int]] = {}  # a tensor is hashed by its identity
    for fragment in live.fragments:
        for step in stored.steps(fragment.name):
            name, expected = counts.setdefault(fragment.location.flat, (fragment.name, step))
            if step != expected:
                raise CheckpointError(
                    f"{str(stored.directory)!r}: parameter {fragment.name!r} has taken {step} "
                    f"optimizer steps, {name!r} {expected}, but this ZeRO stage counts once for "
                    "both: resume at the ZeRO stage that wrote the checkpoint"
                )
    for flat, (_, step) in counts.items():
        live.init_state(flat, step)


def _restore_untrained(module: nn.Module, weights: WeightSlices, ctx: ParallelContext) -> None:
    """Restore buffers and frozen parameters, which no optimizer holds, from the weights."""
    names = canonical_names(module.specs)  # type: ignore[arg-type]
    frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
    for name, tensor in {**persistent_buffers(module), **frozen}.items():
        _copy_weight(names.get(name, name), tensor, weights, ctx)


def _copy_weight(name: str, tensor: Tensor, weights: WeightSlices, ctx: ParallelContext) -> None:
    sharding = sharding_of(name, tensor) if isinstance(tensor, nn.Parameter) else Sharding()
    local = weights.read(name, sharding, expert=ctx.expert)
    if tuple(local.shape) != local_shape(tensor) or local.dtype != tensor.dtype:
        raise CheckpointError(
            f"{str(weights.directory)!r}: {name!r} is {local.dtype} {list(local.shape)}, the model "
            f"has {tensor.dtype} {list(local_shape(tensor))}: it is of another model; resume with "
            "the configuration that wrote it"
        )
    start, elements = local_shard(tensor)
    elements.copy_(local.reshape(-1).narrow(0, start, elements.numel()))
