"""Transitions between replicated, sequence-sharded and tensor-parallel activations.

Every layer follows two conventions:

* Without sequence parallelism an activation between layers is replicated on every tensor rank, and
  so is its gradient.
* With sequence parallelism each rank holds its own tokens, [s/t, ...]. A tensor that is replicated
  nevertheless ([s, ...], or one without tokens) has a *partial* gradient on each rank: the true
  gradient is the sum over tensor ranks, taken where the tensor was created (the backward of
  `gather_sequence`, or the hook of a parameter that declares `partial_gradient`).

Shapes: s sequence, t tensor size. At tensor size 1 every function returns its input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.context import ParallelContext


def local_seq_len(seq_length: int, *, ctx: ParallelContext) -> int:
    """The number of tokens of a sequence that this rank holds between layers.

    Raises:
        ValueError: sequence parallelism with a length that the tensor size does not divide.
    """
    if not ctx.sequence_parallel:
        return seq_length
    if seq_length % ctx.tensor.size:
        raise ValueError(
            f"data.sequence_length={seq_length} is not divisible by parallel.tensor="
            f"{ctx.tensor.size}, which sequence_parallel needs; change one of them"
        )
    return seq_length // ctx.tensor.size


def gather_sequence(x: Tensor, *, ctx: ParallelContext) -> Tensor:
    """Gather this rank's tokens [s/t, ...] to those of all ranks [s, ...].

    Forward: an all-gather. Backward: a reduce-scatter of the partial gradients. Identity without
    sequence parallelism.
    """
    if not ctx.sequence_parallel:
        return x
    from parallel import megatron

    return megatron.gather_from_sequence_region(x.contiguous(), group=ctx.tensor.group)


def local_sequence(x: Tensor, *, ctx: ParallelContext) -> Tensor:
    """This rank's tokens [s/t, ...] of a replicated [s, ...]; a view, with a partial gradient."""
    if not ctx.sequence_parallel:
        return x
    return x.chunk(ctx.tensor.size)[ctx.tensor.rank]


def copy_to_tensor_region(x: Tensor, *, ctx: ParallelContext) -> Tensor:
    """Pass a replicated tensor into tensor-parallel computation (this rank's heads or columns).

    Forward: identity. Backward: an all-reduce, since every rank contributes a part; none under
    sequence parallelism, where the gradient stays partial.
    """
    if ctx.tensor.size == 1 or ctx.sequence_parallel:
        return x
    from parallel import megatron

    return megatron.copy_to_tensor_region(x, group=ctx.tensor.group)


def reduce_from_tensor_region(x: Tensor, *, ctx: ParallelContext) -> Tensor:
    """Sum the ranks' partial results [s, ...] to a replicated tensor, or to this rank's [s/t, ...].

    Forward: an all-reduce, or a reduce-scatter over the sequence. Backward: none, or an all-gather.
    """
    if ctx.tensor.size == 1:
        return x
    from parallel import megatron

    if ctx.sequence_parallel:
        return megatron.reduce_scatter_to_sequence_region(x, group=ctx.tensor.group)
    return megatron.reduce_from_tensor_region(x, group=ctx.tensor.group)


def sum_over_tensor_ranks(x: Tensor, *, ctx: ParallelContext) -> Tensor:
    """Sum the ranks' partial results on every rank. Backward: the same gradient for every part."""
    if ctx.tensor.size == 1:
        return x
    from parallel import megatron

    own = x.clone(memory_format=torch.contiguous_format)  # it is overwritten
    return megatron.reduce_from_tensor_region(own, group=ctx.tensor.group)


def sum_for_tensor_ranks(x: Tensor, *, ctx: ParallelContext) -> Tensor:
    """Sum the ranks' partial results for what each rank then does with its own heads or columns.

    Forward and backward: an all-reduce, since the gradient of the sum has a part on every rank.
    """
    if ctx.tensor.size == 1:
        return x
    from parallel import megatron

    return megatron.copy_to_tensor_region(sum_over_tensor_ranks(x, ctx=ctx), group=ctx.tensor.group)


def sum_over_sequence_ranks(x: Tensor, *, ctx: ParallelContext) -> Tensor:
    """`sum_over_tensor_ranks` under sequence parallelism, where ranks hold different tokens."""
    return sum_over_tensor_ranks(x, ctx=ctx) if ctx.sequence_parallel else x


def scale_replicated_grad(x: Tensor, *, ctx: ParallelContext) -> Tensor:
    """Scale the gradient of a value that every tensor rank computes alike, such as a loss term.

    Forward: identity. Backward: under sequence parallelism the gradients of replicated tensors are
    summed over ranks, so each rank contributes 1/t of the gradient.
    """
    return _ScaleGrad.apply(x, ctx.tensor.size) if ctx.sequence_parallel else x


class _ScaleGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.size, None


def all_reduced(x: Tensor, op: Any, *, ctx: ParallelContext) -> Tensor:
    """Reduce x over tensor ranks with `op`, in place and without gradient."""
    if ctx.tensor.size > 1:
        dist.all_reduce(x, op=op, group=ctx.tensor.group)
    return x
