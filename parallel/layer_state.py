"""Layer state learnt from the data beside the parameters, updated after every optimizer step.

Such state (a threshold, a running mean) must not change inside a step, or accumulation and
recomputation would change what the step computes. So a module only accumulates sums, and
`update_layer_states` gives it, once per step, the sums over all micro-batches and data ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

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


def layer_state_owners(module: nn.Module) -> list[UpdatedAfterStep]:
    """The modules below `module` whose state is updated after every step."""
    return [m for m in module.modules() if isinstance(m, UpdatedAfterStep)]


@runtime_checkable
class ChangedByStages(Protocol):
    """A module with settings that a stage of a curriculum may change."""

    def change_settings(self, settings: Mapping[str, Any]) -> None:
        """Take new values of those of the `settings` that are the module's."""
        ...


def change_settings(module: nn.Module, settings: Mapping[str, Any]) -> None:
    """Give every layer below `module` new values of settings; no collective."""
    for each in module.modules():
        if isinstance(each, ChangedByStages):
            each.change_settings(settings)


@torch.no_grad()
def update_layer_states(owners: Sequence[UpdatedAfterStep], *, ctx: ParallelContext) -> None:
    """Update the state of every owner (`layer_state_owners`), once per optimizer step.

    Collective over the data and tensor ranks of a stage: one all-reduce and, at tensor size > 1,
    one broadcast, so that tensor ranks cannot differ by a rounding of their all-reduces.
    """
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


def discard_layer_sums(owners: Sequence[UpdatedAfterStep]) -> None:
    """Discard the sums of every owner, after a step that was skipped."""
    for owner in owners:
        owner.take_sums()


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
