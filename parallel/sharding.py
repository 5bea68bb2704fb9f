"""Declarations of every parameter: sharding over ranks, initialiser, optimizer role.

Initialisation, merging for export, splitting for import and gradient reduction use these
declarations alone, so a parameter without one is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.context import Axis, ParallelContext


@dataclass(frozen=True)
class Sharding:
    """Sharding of a parameter over tensor ranks and expert ranks.

    `dim`: the dimension split into equal parts in rank order, or None if the parameter is
    replicated. `full_size`: the size of the full tensor along `dim`; if the number of ranks does
    not divide it, the last ranks hold padding rows, which merging drops. `partial_gradient`: the
    parameter is replicated but each rank sees only a part of the tokens (sequence parallelism), so
    that its gradient must be summed over tensor ranks. `experts`: the number of experts whose
    matrices the parameter stacks along dimension 0, split over expert ranks into equal parts in
    rank order; None for all other parameters, which every data rank holds.
    """

    dim: int | None = None
    full_size: int | None = None
    partial_gradient: bool = False
    experts: int | None = None

    @property
    def extent(self) -> int:
        """`full_size` of a sharded parameter."""
        if self.full_size is None:
            raise ValueError(f"{self} is sharded along {self.dim} but does not say its full_size")
        return self.full_size


@dataclass(frozen=True)
class Normal:
    """Independent N(0, std^2)."""

    std: float


@dataclass(frozen=True)
class Constant:
    """Every element is `value`."""

    value: float


# A callable takes the full shape and returns the full tensor (fp32, CPU); for small parameters.
Init = Normal | Constant | Callable[[torch.Size, torch.Generator], Tensor]


# The role of a parameter for the optimizer, independent of its number of dimensions:
#   matrix: maps features to features, alone or stacked (one per expert);
#   embedding, head: a row per entry of the vocabulary;
#   router, gate: narrow weights that make a decision per token;
#   vector: gains, biases, scalars, one per channel or per head: never decayed;
#   other: slots, modulations, adapters, filters.
Role = Literal["matrix", "embedding", "head", "router", "gate", "vector", "other"]


class Extent(NamedTuple):
    """Rows [start, stop) of the full tensor on a rank, and its number of rows with padding."""

    start: int
    stop: int
    padded: int


def local_extent(full_size: int, *, size: int, rank: int) -> Extent:
    """The part of `full_size` that `rank` of `size` holds: ceil(full_size / size) rows, padded."""
    padded = -(-full_size // size)
    start = min(rank * padded, full_size)
    return Extent(start, min(start + padded, full_size), padded)


def declare(
    parameter: nn.Parameter, sharding: Sharding, init: Init, *, role: Role | None = None
) -> nn.Parameter:
    """Attach `sharding`, `init` and `role` to a parameter, and the attributes that DeepSpeed reads.

    Without a `role`, a one-dimensional parameter is a "vector" and any other is "other".

    DeepSpeed counts a parameter without `tensor_model_parallel` once per tensor group in the
    gradient norm; a sharded parameter without it makes the norm silently wrong.
    """
    parameter.sharding = sharding  # type: ignore[attr-defined]
    parameter.init = init  # type: ignore[attr-defined]
    parameter.role = role or ("vector" if parameter.dim() < 2 else "other")  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = sharding.dim is not None  # type: ignore[attr-defined]
    if sharding.dim is not None:
        parameter.partition_dim = sharding.dim  # type: ignore[attr-defined]
    return parameter


def declare_replicated(
    parameter: nn.Parameter, init: Init, *, ctx: ParallelContext, role: Role | None = None
) -> nn.Parameter:
    """Declare a parameter that is replicated over tensor ranks, each applying it to its tokens."""
    return declare(parameter, Sharding(partial_gradient=ctx.sequence_parallel), init, role=role)


def sharding_of(name: str, parameter: nn.Parameter) -> Sharding:
    """The declared sharding of a parameter.

    Raises:
        ValueError: the parameter has no declaration.
    """
    sharding = getattr(parameter, "sharding", None)
    if not isinstance(sharding, Sharding):
        raise ValueError(
            f"parameter {name} {tuple(parameter.shape)} declares no sharding; "
            "create it through parallel.layers or call parallel.sharding.declare_replicated on it"
        )
    return sharding


def role_of(name: str, parameter: nn.Parameter) -> Role:
    """The optimizer role of a parameter.

    Raises:
        ValueError: the parameter has no declaration.
    """
    sharding_of(name, parameter)
    return parameter.role  # type: ignore[attr-defined]


def init_of(name: str, parameter: nn.Parameter) -> Init:
    """The initialiser of a parameter.

    Raises:
        ValueError: the parameter has no declaration.
    """
    sharding_of(name, parameter)
    return parameter.init  # type: ignore[attr-defined]


def sharding_table(module: nn.Module) -> dict[str, Sharding]:
    """The sharding of every parameter of `module`, by name.

    Raises:
        ValueError: a parameter has no declaration.
    """
    return {name: sharding_of(name, p) for name, p in module.named_parameters()}


def local_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of this tensor rank's shard, before ZeRO partitions it over data ranks.

    DeepSpeed's ZeRO-3 leaves an empty tensor and notes the shape in an attribute (0.19.8).
    """
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def merge(shards: Sequence[Tensor], sharding: Sharding) -> Tensor:
    """Merge the shards of all tensor ranks, in rank order, into the full tensor without padding."""
    if sharding.dim is None:
        return shards[0]
    return torch.cat(list(shards), dim=sharding.dim).narrow(sharding.dim, 0, sharding.extent)


def all_experts(shard: Tensor, *, ctx: ParallelContext) -> Tensor:
    """Gather a parameter's experts from all expert ranks, in order (collective over them)."""
    sharding: Sharding = getattr(shard, "sharding", Sharding())
    if sharding.experts is None or ctx.expert.size == 1:
        return shard
    parts = [torch.empty_like(shard) for _ in range(ctx.expert.size)]
    dist.all_gather(parts, shard.detach().contiguous(), group=ctx.expert.group)
    return torch.cat(parts)


def split(
    full: Tensor, sharding: Sharding, *, size: int, rank: int, expert: Axis | None = None
) -> Tensor:
    """The shard of `full` on `rank` of `size`, padded with zeros to equal extents.

    With `expert`, a parameter that stacks experts is also split over expert ranks.

    Raises:
        ValueError: the full tensor does not have the declared size.
    """
    if expert is not None and sharding.experts is not None:
        full = full.chunk(expert.size)[expert.rank]
    if sharding.dim is None:
        return full
    if full.shape[sharding.dim] != sharding.extent:
        raise ValueError(
            f"tensor of shape {tuple(full.shape)} has {full.shape[sharding.dim]} along dimension "
            f"{sharding.dim}, the model declares {sharding.full_size}"
        )
    start, stop, padded = local_extent(sharding.extent, size=size, rank=rank)
    shard = full.narrow(sharding.dim, start, stop - start)
    if stop - start == padded:
        return shard
    shape = list(full.shape)
    shape[sharding.dim] = padded - (stop - start)
    return torch.cat([shard, full.new_zeros(shape)], dim=sharding.dim)


def sum_partial_gradients(module: nn.Module, ctx: ParallelContext) -> None:
    """Register hooks that sum the gradients declared `partial_gradient` over tensor ranks.

    Megatron-Core does this in its own training loop at the end of a step, DeepSpeed not at all, so
    a hook on each parameter does it as soon as the gradient of a micro-batch exists. A frozen
    parameter has none.
    """
    if ctx.tensor.size == 1:
        return
    for parameter in module.parameters():
        sharding = getattr(parameter, "sharding", Sharding())
        if sharding.partial_gradient and parameter.requires_grad:
            parameter.register_hook(lambda gradient: _all_reduced(gradient, ctx.tensor.group))


def _all_reduced(gradient: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    gradient = gradient.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(gradient, group=group)
    return gradient
