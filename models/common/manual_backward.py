"""Fused elementwise chains, each as one autograd function.

They read and write activations far less often than the same operations one by one. Every function
has its equation, which the tests evaluate in fp64.

Shapes: s sequence, b batch, h hidden.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def multiply_add(a: Tensor, b: Tensor, c: Tensor, *, scale: float = 1.0) -> Tensor:
    """`y = a + scale * b * c`, three tensors of one shape."""
    # torch.addcmul reads no more in forward, but twice as much in backward.
    y: Tensor = _MultiplyAdd.apply(*alike(a, b, c), scale)
    return y


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
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
