"""Layer state learnt from the data beside the parameters, updated after every optimizer step.

Such state (a threshold, a running mean) must not change inside a step, or accumulation and
recomputation would change what the step computes. So a module only accumulates sums, and
`update_layer_states` gives it, once per step, the sums over all micro-batches and data ranks.
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
    """A module whose state consists of persistent buffers (see `kept_in_dtype`)."""

    def take_sums(self) -> Tensor:
        """Return this rank's sums since the last call, fp64 [n] with constant n, and reset them."""
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
    """Discard the sums of every layer below `module`, after a step that was skipped."""
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
    """Wrap the function of nn.Module._apply so that it moves buffers but keeps their dtype.

    Models are cast to bf16 as a whole, where an average over many steps would no longer change.
    """
    own = {id(buffer) for buffer in module.buffers(recurse=False)}

    def move(tensor: Tensor) -> Tensor:
        moved = apply(tensor)
        if id(tensor) not in own or moved.dtype == tensor.dtype:
            return moved
        return tensor.to(moved.device)

    return move


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers by name; each is replicated on every rank that has the layer."""
    saved = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}
