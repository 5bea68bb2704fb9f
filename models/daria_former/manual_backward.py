"""Parts of a block as one autograd function each; see models.common.manual_backward.

torch.compile fuses such chains itself: where it cannot trace ours (`out=` of another layout) it is
given the equation.

Shapes: s sequence, b batch, h hidden, E emotion, n heads, d head dimension, P paths.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.common.manual_backward import alike
from models.common.norms import inverse_rms
from models.common.rope import Rotation
from parallel.precision import at_least_fp32


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


def normed_linear(x: Tensor, weight: Tensor, matrix: Tensor, *, eps: float) -> Tensor:
    """`y = W (w * x / rms(x))` in fp32 or wider: x [s, b, h], `weight` w [h], `matrix` W [m, h]."""
    y: Tensor = _NormedLinear.apply(x, weight, matrix, eps)
    return y


def adaptive_norm(
    x: Tensor, e: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, eps: float
) -> Tensor:
    """`y = w * x / rms(x) * (1 + S e) + B e`: x [s, b, h], e [s, b, E], `weight` [h], `scale` S and
    `shift` B [h, E]."""
    y: Tensor = _AdaptiveNorm.apply(x, e, weight, scale, shift, eps)
    return y


def fuse(a: Tensor, f: Tensor, x: Tensor, gate: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """`u = g_1 a + g_2 f + g_3 x / rms(x)`, `g = 2 softmax(W [a; f; x / rms(x)] + c)`: [s, b, h]
    each, `gate` W [3, 3h], `bias` c [3]."""
    u: Tensor = _Fuse.apply(*alike(a, f, x), gate, bias, eps)
    return u


def gated_update(
    x: Tensor,
    u: Tensor,
    down: Tensor,
    statistics: Tensor,
    up: Tensor,
    bias: Tensor,
    *,
    eps: float,
) -> Tensor:
    """`y = x + 2 sigmoid(U (D u / rms(u) + S [mean(u); log(1 + var(u))]) + c) * u`: [s, b, h] each,
    `down` D [R, h], `statistics` S [R, 2], `up` U [h, R], `bias` c [h]."""
    y: Tensor = _GatedUpdate.apply(*alike(x, u), down, statistics, up, bias, eps)
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
        along = (g * y).sum(dim=-1, keepdim=True)
        inner = torch.addcmul(g, y, along, value=-1.0 / d).permute(2, 0, 1, 3)
        gradient = g.new_empty(s, b, n, d)
        return torch.mul(inner, inverse.to(g.dtype), out=gradient), None


class _RotatedHeads(torch.autograd.Function):
    """Backward rotates the gradient back by the same angle to u: `dx = gain u`, `dgain = u x`."""

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


class _NormedLinear(torch.autograd.Function):
    """With r = 1 / rms(x) and M = W diag(w), `y = r M x`; for k = r dy, `dx = k M - x r^3 dr / h`,
    `dM = k^T x`, `dr = dy . M x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, matrix: Tensor, eps: float) -> Tensor:
        with _no_autocast(x):
            inverse = inverse_rms(x, eps=eps)
            scaled = (matrix * weight).to(x.dtype)
            product = F.linear(x, scaled)
            ctx.save_for_backward(x, weight, matrix, inverse, scaled, product)
            return product * inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, matrix, inverse, scaled, product = ctx.saved_tensors
        with _no_autocast(x):
            of_product = (g * inverse).to(x.dtype)
            of_inverse = (g * product).sum(dim=-1, keepdim=True)
            gradient = (of_product @ scaled).addcmul_(x, _of_input(of_inverse, inverse, x))
            of_scaled = of_product.flatten(0, 1).mT @ x.flatten(0, 1)
            of_weight = (of_scaled * matrix).sum(dim=0).to(weight.dtype)
            return gradient, of_weight, (of_scaled * weight).to(matrix.dtype), None


class _AdaptiveNorm(torch.autograd.Function):
    """With r = 1 / rms(x) and m = r w (1 + S e), y = m x + B e. As a product of matrices,
    `m = (r [e; 1]) M^T` with `M = [w S, w]`, so that r and w cost no pass over the activations:

    `dx = m g - x r^3 dr / h`, `dB = g^T e`, `dM = (g x)^T (r [e; 1])`, `dr = (g x) M . [e; 1]`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, e: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, eps: float
    ) -> Tensor:
        with _no_autocast(x):
            inverse = inverse_rms(x, eps=eps)
            one = F.pad(e, (0, 1), value=1.0)
            column = weight.unsqueeze(1)
            matrix = torch.cat((scale * column, column), dim=1).to(x.dtype)
            factor = F.linear((one * inverse).to(x.dtype), matrix)
            ctx.save_for_backward(x, one, inverse, matrix, factor, weight, scale, shift)
            return F.linear(e.to(x.dtype), shift.to(x.dtype)).addcmul_(x, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, one, inverse, matrix, factor, weight, scale, shift = ctx.saved_tensors
        with _no_autocast(x):
            products, rows = (g * x).flatten(0, 1), g.flatten(0, 1)
            scaled = (one * inverse).to(x.dtype).flatten(0, 1)
            of_scaled = (products @ matrix).view(one.shape)
            of_inverse = (of_scaled * one).sum(dim=-1, keepdim=True)
            gradient = (g * factor).addcmul_(x, _of_input(of_inverse, inverse, x))
            e, of_one = one[..., :-1], of_scaled * inverse
            of_e = of_one[..., :-1] + (rows @ shift.to(g.dtype)).view(e.shape)
            of_matrix = products.mT @ scaled
            of_scale, of_weight = of_matrix[:, :-1], of_matrix[:, -1]
            return (
                gradient,
                of_e.to(e.dtype),
                ((of_scale * scale).sum(dim=1) + of_weight).to(weight.dtype),
                (of_scale * weight.unsqueeze(1)).to(scale.dtype),
                (rows.mT @ e.flatten(0, 1).to(g.dtype)).to(shift.dtype),
                None,
            )


class _Fuse(torch.autograd.Function):
    """With r = 1 / rms(x), the third gate is that of x itself, r g_3; h = du . [a; f; r x]."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, f: Tensor, x: Tensor, gate: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        with _no_autocast(x):
            inverse = inverse_rms(x, eps=eps)
            # As matrices of their own: strided ones are multiplied the slow way round.
            matrices = [part.to(x.dtype).contiguous() for part in gate.chunk(3, dim=1)]
            of_a, of_f, of_x = (
                at_least_fp32(F.linear(part, matrix))
                for part, matrix in zip((a, f, x), matrices, strict=True)
            )
            gates = 2.0 * (of_a + of_f + inverse * of_x + bias).softmax(dim=-1)
            weights = _with_last(gates, gates[..., 2:] * inverse).to(x.dtype)
            u = a * weights[..., :1]
            u.addcmul_(f, weights[..., 1:2]).addcmul_(x, weights[..., 2:])
            ctx.save_for_backward(a, f, x, *matrices, inverse, of_x, gates, gate, bias)
            return u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, f, x, *matrices, inverse, of_x, gates, gate, bias = ctx.saved_tensors
        with _no_autocast(x):
            g = g.contiguous()
            along = torch.stack([(g * z).sum(-1, dtype=gates.dtype) for z in (a, f, x)], dim=-1)
            of_gates = _with_last(along, along[..., 2:] * inverse)
            mean = (of_gates * gates).sum(dim=-1, keepdim=True) / 2.0
            of_logits = gates * (of_gates - mean)
            of_inverse = (of_logits * of_x).sum(dim=-1, keepdim=True) + along[..., 2:] * gates[
                ..., 2:
            ]
            weights = _with_last(gates, gates[..., 2:] * inverse).to(x.dtype)
            gradients, of_matrices = [], []
            for i, (z, matrix) in enumerate(zip((a, f, x), matrices, strict=True)):
                own = (of_logits if i < 2 else of_logits * inverse).to(x.dtype).flatten(0, 1)
                gradient = g * weights[..., i : i + 1]
                gradient.view(-1, g.shape[-1]).addmm_(own, matrix)
                gradients.append(gradient)
                of_matrices.append(own.mT @ z.flatten(0, 1))
            gradients[2].addcmul_(x, _of_input(of_inverse, inverse, x))
            of_gate = torch.cat(of_matrices, dim=1).to(gate.dtype)
            return *gradients, of_gate, of_logits.sum(dim=(0, 1)).to(bias.dtype), None


class _GatedUpdate(torch.autograd.Function):
    """With r = 1 / rms(u), v = var(u) = r^-2 - eps - mean^2, z the argument of the sigmoid s and
    t = D u, `dz = 2 s (1 - s) g u`, and for the features `k = U^T dz`:

    `du = 2 s g + (r k) D + dmean / h - u r^3 dr / h`, `dr = k . t - 2 r^-3 dv`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u: Tensor,
        down: Tensor,
        statistics: Tensor,
        up: Tensor,
        bias: Tensor,
        eps: float,
    ) -> Tensor:
        with _no_autocast(x):
            ctx.eps = eps
            inverse = inverse_rms(u, eps=eps)
            mean = u.mean(dim=-1, keepdim=True, dtype=inverse.dtype)
            turned = F.linear(u, down.to(u.dtype))
            features = turned * inverse + F.linear(
                _statistics(mean, inverse, eps), statistics.to(inverse.dtype)
            )
            features = features.to(u.dtype)
            amount = F.linear(features, up.to(u.dtype), bias.to(u.dtype)).sigmoid_()
            ctx.save_for_backward(
                u, mean, inverse, turned, features, amount, down, statistics, up, bias
            )
            return torch.addcmul(x, u, amount, value=2.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        u, mean, inverse, turned, features, amount, down, statistics, up, bias = ctx.saved_tensors
        with _no_autocast(u):
            size, g = u.shape[-1], g.contiguous()
            doubled = torch.mul(g, 2.0)
            inner = torch.ops.aten.sigmoid_backward(doubled * u, amount).flatten(0, 1)
            gradient = doubled.mul_(amount)
            of_features = (inner @ up.to(g.dtype)).view(features.shape)
            wide = of_features.to(inverse.dtype)
            noted = _statistics(mean, inverse, ctx.eps)
            of_mean, of_log = (wide @ statistics.to(wide.dtype)).split(1, dim=-1)
            variance = inverse.pow(-2) - ctx.eps - mean.square()
            of_variance = torch.where(variance > 0, of_log / (1.0 + variance), 0.0)
            of_mean = of_mean - 2.0 * mean * of_variance
            of_inverse = (wide * turned).sum(dim=-1, keepdim=True) - 2.0 * inverse.pow(
                -3
            ) * of_variance
            turned_back = (wide * inverse).to(u.dtype).flatten(0, 1)
            gradient.view(-1, size).addmm_(turned_back, down.to(u.dtype))
            gradient.addcmul_(u, _of_input(of_inverse, inverse, u)).add_(
                (of_mean / size).to(u.dtype)
            )
            return (
                g,
                gradient,
                (turned_back.mT @ u.flatten(0, 1)).to(down.dtype),
                (wide.flatten(0, 1).mT @ noted.flatten(0, 1)).to(statistics.dtype),
                (inner.mT @ features.flatten(0, 1)).to(up.dtype),
                inner.sum(dim=0).to(bias.dtype),
                None,
            )


def _statistics(mean: Tensor, inverse: Tensor, eps: float) -> Tensor:
    """`[mean; log(1 + var)]` from the mean and 1 / rms."""
    variance = (inverse.pow(-2) - eps - mean.square()).clamp(min=0.0)
    return torch.cat((mean, variance.log1p()), dim=-1)


def _of_input(of_inverse: Tensor, inverse: Tensor, x: Tensor) -> Tensor:
    """The factor of x in dx: of r = (mean(x^2) + eps)^(-1/2) it is `-r^3 dr / h`."""
    return (of_inverse * inverse.pow(3) / -x.shape[-1]).to(x.dtype)


def _with_last(x: Tensor, last: Tensor) -> Tensor:
    return torch.cat((x[..., :-1], last), dim=-1)


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Suspend torch.autocast: products inside have the dtype of x, which may be a wider one."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


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
        inverses, scaled = [], torch.empty_like(out, memory_format=torch.contiguous_format)
        for p, (x, gain) in enumerate(zip(readouts, gains, strict=True)):
            inverses.append(inverse_rms(x, eps=eps))
            weight = (gates[..., p : p + 1] * inverses[p]).to(x.dtype)
            torch.mul(x, gain.unsqueeze(1), out=scaled)
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
        g = g.permute(1, 2, 0, 3)
        gate_gradients, readout_gradients, gain_gradients = [], [], []
        for p, (x, gain, inverse) in enumerate(zip(readouts, gains, inverses, strict=True)):
            weight = gates[..., p : p + 1] * inverse
            products = torch.mul(g, x, out=torch.empty_like(x))
            along = torch.matmul(products, gain.unsqueeze(-1)).to(weight.dtype)
            per_head = torch.matmul(weight.to(x.dtype).mT, products)  # [b, n, 1, d]
            gain_gradients.append(per_head.sum(dim=0).squeeze(1))
            gate_gradients.append(along * inverse)
            scale = weight * inverse.square() * along / -x.shape[-1]
            gradient = torch.mul(g, gain.unsqueeze(1), out=products).mul_(weight.to(x.dtype))
            readout_gradients.append(gradient.addcmul_(x, scale.to(x.dtype)))
        return None, torch.cat(gate_gradients, dim=-1), *readout_gradients, *gain_gradients
