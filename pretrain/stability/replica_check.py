"""Detection of ranks whose replicas of the same tensor have diverged.

Data ranks hold the same parameters (except under ZeRO-3, which keeps no replicas, and for experts,
which only some of them share), tensor ranks the same replicated parameters, and pipeline stages a
copy each of a tied one. Training never compares them: a flipped bit or a missing reduction goes
unnoticed while the loss keeps falling. (Under ZeRO-1 and 2 every step overwrites the replicas of
data ranks from the masters, so only divergence since the last step is seen.)
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

# Tolerated difference of tied copies, relative to their norm. Each stage sums over its own data
# ranks, so the sums round differently; a stage that trains its own copy soon exceeds this.
_TIED_TOLERANCE = 2.0**-8

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def check_replicas(module: nn.Module, ctx: ParallelContext, ranks: RankGroup, *, step: int) -> None:
    """Compare replicated tensors; collective over all ranks.

    Costs one pass over the parameters and, if all agree, two all-reduces of one integer per
    parameter; a tied parameter is broadcast from its first pipeline stage.

    Raises:
        TrainingError: on every rank; names the tensor and the ranks that differ from the others.
    """
    tensors = {**dict(module.named_parameters()), **persistent_buffers(module)}
    if any(map(is_partitioned, tensors.values())):  # ZeRO-3: no replicas
        return
    replicated = {
        name: tensor
        for name, tensor in tensors.items()
        if not getattr(tensor, "tensor_model_parallel", False)
    }
    experts = {n: t for n, t in tensors.items() if is_shared_by_expert_ranks(t)}
    common = {n: t for n, t in tensors.items() if n not in experts}
    # Every rank compares over all axes whatever the first one finds: they are collective.
    found = [
        _difference(replicated, ctx.tensor),
        _difference(common, ctx.data),
        _difference(experts, ctx.expert_data),
        _tied_difference(module),
    ]
    message = ranks.first_error(next((text for text in found if text is not None), None))
    if message is not None:
        raise TrainingError(
            f"after step {step} {message}: memory or a reduction is faulty, and ranks have "
            "trained different models since; start again from an earlier checkpoint"
        )


def _difference(tensors: Mapping[str, Tensor], axis: Axis) -> str | None:
    """The first tensor that differs between ranks of an axis, or None."""
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
    # With two ranks it is unknown which one is wrong.
    who = f"rank {', '.join(odd)}" if count > 1 else f"ranks {', '.join(names)}"
    others = " from the others" if count > 1 else " from each other"
    return f"{list(tensors)[column]} of {who} differs{others}"


def _tied_difference(module: nn.Module) -> str | None:
    """The first tied parameter that differs from the copy of its first stage, or None."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = []
    for parameter, group, first_rank in getattr(module, "tied_parameters", []):
        own, first = parameter.detach(), parameter.detach().clone()
        dist.broadcast(first, src=first_rank, group=group)
        distance, size = (own.float() - first.float()).norm(), first.float().norm()
        if not distance <= _TIED_TOLERANCE * size:  # NaN counts as different
            found.append(
                f"{names[id(parameter)]} of rank {dist.get_rank()} differs by "
                f"{float(distance / size):.1e} of its norm from the copy of rank {first_rank} that "
                "it is tied to"
            )
    return found[0] if found else None


def digest(tensor: Tensor) -> Tensor:
    """Sum of a tensor's bits as integers modulo 2^64 (int64); any flipped bit changes it."""
    bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()])
    return bits.sum(dtype=torch.int64)
