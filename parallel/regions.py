"""Activations between what one tensor rank computes and what all of them hold.

Two conventions, which every layer with state of its own has to keep:

* Without sequence parallelism an activation between layers is whole on every tensor rank, and so is
  its gradient.
* With sequence parallelism a rank has its own tokens, [s/t, ...]. A tensor that is whole there all
  the same ([s, ...], or something without tokens) has a *partial* gradient: the true one is the sum
  over tensor ranks, which is taken where the tensor came from (the backward of `gather_sequence`,
  or the hook of a parameter that declares `partial_gradient`).

Shapes: s sequence, t tensor size. At tensor size 1 every function returns its input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.context import ParallelContext


def local_seq_len(seq_length: int, *, ctx: ParallelContext) -> int:
    """How many of the tokens of a sequence this rank has between layers.

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
    """This rank's tokens [s/t, ...] to those of all ranks [s, ...]: all-gather, and in backward a
    reduce-scatter of the partial gradients. Without sequence parallelism they are there already."""
    if not ctx.sequence_parallel:
        return x
    from parallel import megatron

    return megatron.gather_from_sequence_region(x.contiguous(), group=ctx.tensor.group)


def local_sequence(x: Tensor, *, ctx: ParallelContext) -> Tensor:
    """The tokens [s/t, ...] of this rank out of [s, ...]; a view, with a partial gradient."""
    if not ctx.sequence_parallel:
        return x
    return x.chunk(ctx.tensor.size)[ctx.tensor.rank]


def copy_to_tensor_region(x: Tensor, *, ctx: ParallelContext) -> Tensor:
    """A whole tensor on its way into what this rank alone computes (its heads, its columns).

    Forward: the same tensor. Backward: an all-reduce, since every rank contributes a part; none
    under sequence parallelism, where the gradient stays partial.
    """
    if ctx.tensor.size == 1 or ctx.sequence_parallel:
        return x
    from parallel import megatron

    return megatron.copy_to_tensor_region(x, group=ctx.tensor.group)


def reduce_from_tensor_region(x: Tensor, *, ctx: ParallelContext) -> Tensor:
    """Parts [s, ...] that each rank computed, summed: whole, or [s/t, ...] of own tokens.

    Forward: an all-reduce, or a reduce-scatter over the sequence. Backward: none, or an all-gather.
    """
    if ctx.tensor.size == 1:
        return x
    from parallel import megatron

    if ctx.sequence_parallel:
        return megatron.reduce_scatter_to_sequence_region(x, group=ctx.tensor.group)
    return megatron.reduce_from_tensor_region(x, group=ctx.tensor.group)


def sum_over_tensor_ranks(x: Tensor, *, ctx: ParallelContext) -> Tensor:
    """Parts that each rank computed, summed on every rank. Backward: the same gradient to all."""
    if ctx.tensor.size == 1:
        return x
    from parallel import megatron

    own = x.clone(memory_format=torch.contiguous_format)  # it is overwritten
    return megatron.reduce_from_tensor_region(own, group=ctx.tensor.group)


def sum_over_sequence_ranks(x: Tensor, *, ctx: ParallelContext) -> Tensor:
    """`sum_over_tensor_ranks` of parts that come from own tokens, where ranks have own tokens."""
    return sum_over_tensor_ranks(x, ctx=ctx) if ctx.sequence_parallel else x


def scale_replicated_grad(x: Tensor, *, ctx: ParallelContext) -> Tensor:
    """A value that every tensor rank computes alike from whole tensors, such as a loss term.

    Under sequence parallelism the gradients of whole tensors are summed over ranks, so each rank
    sends back 1/t of it.
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
    """`x` reduced over tensor ranks with `op`, in place, without gradient."""
    if ctx.tensor.size > 1:
        dist.all_reduce(x, op=op, group=ctx.tensor.group)
    return x
