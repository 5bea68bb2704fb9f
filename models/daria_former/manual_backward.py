"""Parts of a block as one autograd function each; see models.common.manual_backward.

torch.compile fuses such chains itself: where it cannot trace ours (`out=` of another layout) it is
given the equation.

Shapes: s sequence, b batch, h hidden, E emotion, n heads, d head dimension, P paths.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.common.norms import inverse_rms
from models.common.rope import Rotation


def normalised_heads(x: Tensor, *, eps: float) -> Tensor:
    """`y = x / rms(x)` with heads first: [s, b, n, d] -> contiguous [b, n, s, d]."""
    if torch.compiler.is_compiling():
        return (x * inverse_rms(x, eps=eps).to(x.dtype)).permute(1, 2, 0, 3).contiguous()
    y: Tensor = _NormalisedHeads.apply(x, eps)
    return y


def rotated_heads(x: Tensor, gain: Tensor, rotation: Rotation) -> Tensor:
    """`y = rotate(gain * x)`, see models.common.rope.rotate: x [b, n, s, d], gain [n, d]."""
    cos, sin = (table.to(x.dtype) for table in rotation)
    y: Tensor = _RotatedHeads.apply(x, gain.to(x.dtype), cos, sin)
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


class _NormalisedHeads(torch.autograd.Function):
    """With r = 1 / rms(x): `dx = r (g - y mean(g y))`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        inverse = inverse_rms(x, eps=eps)
        s, b, n, d = x.shape
        y = x.new_empty(b, n, s, d)
        torch.mul(x, inverse.to(x.dtype), out=y.permute(2, 0, 1, 3))
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        y, inverse = ctx.saved_tensors
        b, n, s, d = y.shape
        along = torch.linalg.vecdot(g, y).unsqueeze(-1)
        inner = torch.addcmul(g, y, along, value=-1.0 / d).permute(2, 0, 1, 3)
        gradient = g.new_empty(s, b, n, d)
        return torch.mul(inner, inverse.to(g.dtype), out=gradient), None


class _RotatedHeads(torch.autograd.Function):
    """Backward rotates the gradient back by the same angle: `u`, then `dx = gain u`, `dgain = u x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain, cos, sin)
        return _turned(x * gain.unsqueeze(1), cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, gain, cos, sin = ctx.saved_tensors
        turned = _turned(g, cos, sin, back=True)
        gain_gradient = (turned * x).sum(dim=(0, 2))
        return turned.mul_(gain.unsqueeze(1)), gain_gradient, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """`x cos + roll(x, d / 2) sin`, or with the other sign, in halves: a roll is a copy."""
    y = x * cos
    (y_1, y_2), (x_1, x_2), (sin_1, sin_2) = (each.chunk(2, dim=-1) for each in (y, x, sin))
    sign = -1.0 if back else 1.0
    y_1.addcmul_(x_2, sin_1, value=sign)
    y_2.addcmul_(x_1, sin_2, value=sign)
    return y


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
