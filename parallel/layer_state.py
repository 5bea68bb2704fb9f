"""What a layer learns from the data beside its parameters, updated after every optimizer step.

Such state (a threshold, a running mean) must not change inside a step: accumulation and
recomputation would then change what a step computes. So a module only sums what it sees, and
`update_layer_states` hands it, once per step, the sums over all micro-batches and data ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.context import ParallelContext


@runtime_checkable
class UpdatedAfterStep(Protocol):
    """A module with such state. Its state is made of persistent buffers (see `kept_in_dtype`)."""

    def take_sums(self) -> Tensor:
        """fp64 [n]: what this rank has summed since the last call; begins anew. n is constant."""
        ...

    def after_step(self, sums: Tensor) -> None:
        """Update the buffers from the sums over all data ranks: fp64 [n]."""
        ...


@torch.no_grad()
def update_layer_states(module: nn.Module, *, ctx: ParallelContext) -> None:
    """Update the state of every layer below `module`, once per optimizer step.

    Collective over the data and tensor ranks of a stage: one all-reduce and, at tensor size > 1,
    one broadcast, so that tensor ranks cannot differ by a rounding of their all-reduces.
    """
    owners = _owners(module)
    if not owners:
        return
    parts = [owner.take_sums() for owner in owners]
    sums = torch.cat(parts)
    if ctx.data.size > 1:
        dist.all_reduce(sums, group=ctx.data.group)
    if ctx.tensor.size > 1:
        dist.broadcast(sums, group=ctx.tensor.group, group_src=0)
    for owner, own in zip(owners, sums.split([len(part) for part in parts]), strict=True):
        owner.after_step(own)


def discard_layer_sums(module: nn.Module) -> None:
    """Forget what every layer below `module` has summed in a step that changes nothing."""
    for owner in _owners(module):
        owner.take_sums()


def _owners(module: nn.Module) -> list[UpdatedAfterStep]:
    # A look at a protocol takes microseconds: once for each class, not for each of its modules.
    kinds = {type(m) for m in module.modules()}
    updated = tuple(kind for kind in kinds if issubclass(kind, UpdatedAfterStep))
    return [m for m in module.modules() if isinstance(m, updated)]


def kept_in_dtype(
    module: nn.Module, apply: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """`apply` of nn.Module._apply for a module whose buffers may move but keep their dtype.

    Models are cast to bf16 as a whole, in which an average over many steps stands still.
    """
    own = {id(buffer) for buffer in module.buffers(recurse=False)}

    def move(tensor: Tensor) -> Tensor:
        moved = apply(tensor)
        if id(tensor) not in own or moved.dtype == tensor.dtype:
            return moved
        return tensor.to(moved.device)

    return move


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer that is saved with the weights; whole on every rank that has the layer."""
    saved = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}
