"""Fused elementwise chains, each as one autograd function.

They read and write activations far less often than the same operations one by one. Every function
has its equation, which the tests evaluate in fp64.

Shapes: s sequence, b batch, h hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def multiply_add(a: Tensor, b: Tensor, c: Tensor, *, scale: float = 1.0) -> Tensor:
    """`y = a + scale * b * c`, three tensors of one shape."""
    # torch.addcmul reads no more in forward, but twice as much in backward.
    y: Tensor = _MultiplyAdd.apply(*_alike(a, b, c), scale)
    return y


def weighted_sum(parts: Sequence[Tensor], weights: Tensor) -> Tensor:
    """`y = sum_i weights_i * parts_i`: [s, b, h] each and one number per token, [s, b, parts]."""
    y: Tensor = _WeightedSum.apply(weights, *_alike(*parts))
    return y


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast all to the widest of their dtypes, which torch.autocast may have mixed."""
    widest = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    return tuple(x.to(widest) for x in tensors)


class _MultiplyAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, c: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(b, c)
        ctx.scale = scale
        return torch.addcmul(a, b, c, value=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        b, c = ctx.saved_tensors
        scaled = g if ctx.scale == 1.0 else g * ctx.scale
        return g, scaled * c, scaled * b, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *parts)
        first, *others = weights.to(parts[0].dtype).split(1, dim=-1)
        y = parts[0] * first
        for part, weight in zip(parts[1:], others, strict=True):
            y.addcmul_(part, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        weights, *parts = ctx.saved_tensors
        columns = weights.to(g.dtype).split(1, dim=-1)
        along = torch.stack([torch.linalg.vecdot(g, part) for part in parts], dim=-1)
        return along.to(weights.dtype), *(g * column for column in columns)
