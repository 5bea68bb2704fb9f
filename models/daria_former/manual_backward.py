"""Elementwise chains, each as one autograd function.

They read and write activations far less often than the same operations one by one: five paths
multiply whatever is done per path. Every function has its equation, which the tests evaluate in
fp64. torch.compile fuses such chains itself: where it cannot trace ours (`out=` of another layout)
it gets the equation. Shapes: s sequence, b batch, h hidden, n heads, d head dimension, P paths.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.common.norms import inverse_rms


def scaled_heads(x: Tensor, gain: Tensor) -> Tensor:
    """`y = gain * x` with heads first: [s, b, n, d] and [n, d] -> contiguous [b, n, s, d]."""
    gain = gain.to(x.dtype)
    if torch.compiler.is_compiling():
        return (x * gain).permute(1, 2, 0, 3).contiguous()
    y: Tensor = _ScaledHeads.apply(x, gain)
    return y


def multiply_add(a: Tensor, b: Tensor, c: Tensor, *, scale: float = 1.0) -> Tensor:
    """`y = a + scale * b * c`, three tensors of one shape."""
    # torch.addcmul reads as little in forward, and twice as much in backward.
    y: Tensor = _MultiplyAdd.apply(*_alike(a, b, c), scale)
    return y


def weighted_sum(parts: Sequence[Tensor], weights: Tensor) -> Tensor:
    """`y = sum_i weights_i * parts_i`: [s, b, h] each and one number per token, [s, b, parts]."""
    y: Tensor = _WeightedSum.apply(weights, *_alike(*parts))
    return y


def mix_paths(
    readouts: Sequence[Tensor], gates: Tensor, gains: Sequence[Tensor], *, eps: float
) -> Tensor:
    """`y = sum_p gate_p * gain_p * x_p / rms(x_p)`: what each path read, normalised per head.

    `readouts`: P of [b, n, s, d]; `gates` fp32 [b, n, s, P]; `gains`: P of [n, d].
    Returns [s, b, n, d].
    """
    gains = [gain.to(readouts[0].dtype) for gain in gains]
    if torch.compiler.is_compiling():
        parts = [
            x * gain.unsqueeze(1) * (gate * inverse_rms(x, eps=eps)).to(x.dtype)
            for x, gain, gate in zip(readouts, gains, gates.split(1, dim=-1), strict=True)
        ]
        return functools.reduce(torch.add, parts).permute(2, 0, 1, 3).contiguous()
    y: Tensor = _MixPaths.apply(eps, gates, *readouts, *gains)
    return y


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in the widest of their dtypes; torch.autocast mixes them."""
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


class _MixPaths(torch.autograd.Function):
    """With r = 1 / rms(x_p), c = gate_p r and h = sum_d g gain_p x_p:

    `dx_p = c g gain_p - x_p (c r^2 h / d)`, `dgate_p = r h`, `dgain_p = sum_{s,b} c g x_p`.
    """

    @staticmethod
    def forward(ctx: Any, eps: float, gates: Tensor, *tensors: Tensor) -> Tensor:
        count = len(tensors) // 2
        readouts, gains = tensors[:count], tensors[count:]
        b, n, s, d = readouts[0].shape
        y = readouts[0].new_empty(s, b, n, d)
        out = y.permute(1, 2, 0, 3)
        inverses = []
        for p, (x, gain) in enumerate(zip(readouts, gains, strict=True)):
            inverses.append(inverse_rms(x, eps=eps))
            weight = (gates[..., p : p + 1] * inverses[p]).to(x.dtype)
            scaled = x * gain.unsqueeze(1)
            if p == 0:
                torch.mul(scaled, weight, out=out)
            else:
                out.addcmul_(scaled, weight)
        ctx.save_for_backward(gates, *tensors, *inverses)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        gates, *rest = ctx.saved_tensors
        count = len(rest) // 3
        readouts, gains, inverses = rest[:count], rest[count : 2 * count], rest[2 * count :]
        g = g.permute(1, 2, 0, 3).contiguous()
        gate_gradients, readout_gradients, gain_gradients = [], [], []
        for p, (x, gain, inverse) in enumerate(zip(readouts, gains, inverses, strict=True)):
            weight = gates[..., p : p + 1] * inverse
            products = g * x
            along = torch.matmul(products, gain.unsqueeze(-1)).to(weight.dtype)
            per_head = torch.matmul(weight.to(x.dtype).mT, products)  # [b, n, 1, d]
            gain_gradients.append(per_head.sum(dim=0).squeeze(1))
            gate_gradients.append(along * inverse)
            scale = weight * inverse.square() * along / -x.shape[-1]
            gradient = torch.mul(g, gain.unsqueeze(1), out=products).mul_(weight.to(x.dtype))
            readout_gradients.append(gradient.addcmul_(x, scale.to(x.dtype)))
        return None, torch.cat(gate_gradients, dim=-1), *readout_gradients, *gain_gradients
