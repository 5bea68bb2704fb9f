"""Fused elementwise chains, each as one autograd function.

They read and write activations far less often than the same operations one by one. Every function
has its equation, which the tests evaluate in fp64. torch.compile fuses such chains itself: where it
cannot trace ours (`out=` of another layout) it is given the equation.

Shapes: s sequence, b batch, h hidden, n heads, d head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def scaled_heads(x: Tensor, gain: Tensor) -> Tensor:
    """`y = gain * x` with heads first: [s, b, n, d] and [n, d] -> contiguous [b, n, s, d]."""
    gain = gain.to(x.dtype)
    if torch.compiler.is_compiling():
        return (x * gain).permute(1, 2, 0, 3).contiguous()
    y: Tensor = _ScaledHeads.apply(x, gain)
    return y


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


class _ScaledHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain)
        s, b, n, d = x.shape
        y = x.new_empty(b, n, s, d)
        torch.mul(x, gain, out=y.permute(2, 0, 1, 3))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, gain = ctx.saved_tensors
        g = g.permute(2, 0, 1, 3)
        gradient = torch.empty_like(x)
        torch.mul(g, x, out=gradient)
        gain_gradient = gradient.sum(dim=(0, 1))
        return torch.mul(g, gain, out=gradient), gain_gradient


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
