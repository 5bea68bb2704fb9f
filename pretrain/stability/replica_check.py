"""Finds ranks whose copies of the same numbers have come to differ.

Data ranks hold the same parameters (but for ZeRO-3, which leaves no copies, and for experts, which
only some of them have in common), tensor ranks the same replicated ones, pipeline stages a copy
each of a tied one. Nothing compares them in training: a flipped bit or a reduction that was left
out goes on unseen, and the loss falls on. (With ZeRO-1 and 2 a step overwrites the copies of data
ranks from the masters, so that there only what has gone wrong since is seen.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.context import Axis, ParallelContext
from parallel.layer_state import persistent_buffers
from pretrain.distributed.consensus import RankGroup
from pretrain.engine.deepspeed_moe import is_shared_by_expert_ranks
from pretrain.engine.partitions import is_partitioned
from pretrain.errors import TrainingError

# Copies of a tied parameter may differ by so much of their norm. Each stage sums over its own data
# ranks, and two sums of many ranks round apart; a stage that trains its own copy is soon further.
_TIED_TOLERANCE = 2.0**-8

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def check_replicas(module: nn.Module, ctx: ParallelContext, ranks: RankGroup, *, step: int) -> None:
    """Compare what ranks hold in common; collective over all ranks.

    One pass over the parameters and, where all is well, two all-reduces of a number per parameter;
    a tied parameter is sent from its first pipeline stage to the others.

    Raises:
        TrainingError: on every rank; names the tensor and the ranks that differ from the others.
    """
    tensors = {**dict(module.named_parameters()), **persistent_buffers(module)}
    if any(map(is_partitioned, tensors.values())):  # ZeRO-3: there are no copies
        return
    replicated = {
        name: tensor
        for name, tensor in tensors.items()
        if not getattr(tensor, "tensor_model_parallel", False)
    }
    experts = {n: t for n, t in tensors.items() if is_shared_by_expert_ranks(t)}
    common = {n: t for n, t in tensors.items() if n not in experts}
    # Every rank compares over all axes, whatever the first has shown: they are collective.
    found = [
        _difference(replicated, ctx.tensor),
        _difference(common, ctx.data),
        _difference(experts, ctx.expert_data),
        _tied_difference(module),
    ]
    message = ranks.first_error(next((text for text in found if text is not None), None))
    if message is not None:
        raise TrainingError(
            f"after step {step} {message}: memory or a reduction has gone wrong, and since then "
            "ranks have trained different models; start again from an earlier checkpoint"
        )


def _difference(tensors: Mapping[str, Tensor], axis: Axis) -> str | None:
    """The first tensor that is not the same on all ranks of an axis, or None."""
    if axis.group is None or axis.size == 1 or not tensors:
        return None
    own = torch.stack([digest(tensor) for tensor in tensors.values()])
    least, most = own.clone(), own.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=axis.group)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=axis.group)
    if torch.equal(least, most):
        return None
    everyone = [torch.empty_like(own) for _ in range(axis.size)]
    dist.all_gather(everyone, own, group=axis.group)
    column = int((least != most).nonzero()[0])
    values = [int(each[column]) for each in everyone]
    names = [str(dist.get_global_rank(axis.group, i)) for i in range(axis.size)]
    usual, count = Counter(values).most_common(1)[0]
    odd = [name for name, value in zip(names, values, strict=True) if value != usual]
    # Of two ranks nobody can say which is wrong.
    who = f"rank {', '.join(odd)}" if count > 1 else f"ranks {', '.join(names)}"
    others = " from the others" if count > 1 else " from each other"
    return f"{list(tensors)[column]} of {who} differs{others}"


def _tied_difference(module: nn.Module) -> str | None:
    """The first tied parameter whose copy here is not that of its first stage, or None."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = []
    for parameter, group, first_rank in getattr(module, "tied_parameters", []):
        own, first = parameter.detach(), parameter.detach().clone()
        dist.broadcast(first, src=first_rank, group=group)
        distance, size = (own.float() - first.float()).norm(), first.float().norm()
        if not distance <= _TIED_TOLERANCE * size:  # NaN is not, either
            found.append(
                f"{names[id(parameter)]} of rank {dist.get_rank()} differs by "
                f"{float(distance / size):.1e} of its norm from the copy of rank {first_rank} that "
                "it is tied to"
            )
    return found[0] if found else None


def digest(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits as integers, modulo 2^64: int64, another for any flipped bit."""
    bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()])
    return bits.sum(dtype=torch.int64)
