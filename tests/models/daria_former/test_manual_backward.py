"""Functions with gradients of their own, against their equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from models.common.manual_backward import multiply_add
from models.common.rope import RotaryTable
from models.daria_former.manual_backward import (
    adaptive_norm,
    fuse,
    gated_update,
    mix_paths,
    normalised_heads,
    normed_linear,
    rotated_heads,
)

EPS = 1e-2
ROTATION = RotaryTable(4, 8, theta=100.0).at(torch.device("cpu"), start=2, length=5)


class Case(NamedTuple):
    """A function, its equation, the shapes of what it takes, and which of that is always fp32."""

    fused: Callable[..., Tensor]
    equation: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    fp32: tuple[int, ...] = ()


def _mixed(gates: Tensor, x: Tensor, y: Tensor, g: Tensor, h: Tensor) -> Tensor:
    parts = zip(gates.unbind(-1), (x, y), (g, h), strict=True)
    return sum(
        w.unsqueeze(-1) * gain.unsqueeze(1) * z / (z.square().mean(-1, keepdim=True) + EPS).sqrt()
        for w, z, gain in parts
    ).permute(2, 0, 1, 3)


def _rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def _rotated(x: Tensor, gain: Tensor) -> Tensor:
    cos, sin = (table.to(x.dtype) for table in ROTATION)
    scaled = x * gain.unsqueeze(1)
    return scaled * cos + scaled.roll(2, dims=-1) * sin


def _fused(a: Tensor, f: Tensor, x: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    stacked = torch.cat((a, f, _rms(x)), dim=-1)
    gates = 2 * (stacked @ gate.T + bias).softmax(dim=-1)
    return sum(g.unsqueeze(-1) * z for g, z in zip(gates.unbind(-1), (a, f, _rms(x)), strict=True))


def _updated(
    x: Tensor, u: Tensor, down: Tensor, statistics: Tensor, up: Tensor, bias: Tensor
) -> Tensor:
    noted = torch.stack((u.mean(-1), u.var(-1, correction=0).log1p()), dim=-1)
    features = _rms(u) @ down.T + noted @ statistics.T
    return x + 2 * (features @ up.T + bias).sigmoid() * u


CASES = {
    "normalised_heads": Case(
        lambda x: normalised_heads(x, eps=EPS),
        lambda x: _rms(x).permute(1, 2, 0, 3),
        ((5, 2, 3, 4),),
    ),
    "rotated_heads": Case(
        lambda x, gain: rotated_heads(x, gain, ROTATION), _rotated, ((2, 3, 5, 4), (3, 4))
    ),
    "normed_linear": Case(
        lambda x, w, m: normed_linear(x, w, m, eps=EPS).to(x.dtype),
        lambda x, w, m: (w * _rms(x)) @ m.T,
        ((3, 2, 6), (6,), (4, 6)),
    ),
    "adaptive_norm": Case(
        lambda *given: adaptive_norm(*given, eps=EPS),
        lambda x, e, w, scale, shift: w * _rms(x) * (1 + e @ scale.T) + e @ shift.T,
        ((3, 2, 6), (3, 2, 4), (6,), (6, 4), (6, 4)),
        fp32=(1,),
    ),
    "fuse": Case(lambda *given: fuse(*given, eps=EPS), _fused, (*((3, 2, 6),) * 3, (3, 18), (3,))),
    "gated_update": Case(
        # Weights of the size of a layer's, with which rounded features move a sigmoid little.
        lambda x, u, *w: gated_update(x, u, *(z / 4 for z in w), eps=EPS),
        lambda x, u, *w: _updated(x, u, *(z / 4 for z in w)),
        ((3, 2, 6), (3, 2, 6), (4, 6), (4, 2), (6, 4), (6,)),
    ),
    "multiply_add": Case(
        lambda a, b, c: multiply_add(a, b, c, scale=0.3),
        lambda a, b, c: a + 0.3 * b * c,
        ((3, 2, 4),) * 3,
    ),
    "mix_paths": Case(
        lambda gates, x, y, g, h: mix_paths([x, y], gates, [g, h], eps=EPS),
        _mixed,
        ((2, 3, 4, 2), (2, 3, 4, 6), (2, 3, 4, 6), (3, 6), (3, 6)),
        fp32=(0,),
    ),
}

pytestmark = pytest.mark.parametrize("name", CASES)


def _inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    case = CASES[name]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in case.shapes]
    wide = torch.promote_types(dtype, torch.float32)
    return [x.to(wide if i in case.fp32 else dtype).requires_grad_() for i, x in enumerate(inputs)]


def _assert_equal(name: str, inputs: list[Tensor], tolerance: float) -> None:
    case = CASES[name]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = case.fused(*inputs), case.equation(*wide)
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    upstream = upstream.to(found.dtype)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    ours = torch.autograd.grad(found, inputs, upstream)
    theirs = torch.autograd.grad(expected, wide, upstream.double())
    for x, mine, other in zip(inputs, ours, theirs, strict=True):
        assert mine.dtype == x.dtype
        scale = other.abs().max()
        torch.testing.assert_close(
            mine.double() / scale, other / scale, rtol=tolerance, atol=tolerance
        )


def test_values_and_gradients_in_fp64(name):
    inputs = _inputs(name, torch.float64)
    _assert_equal(name, inputs, 1e-12)
    assert gradcheck(CASES[name].fused, inputs)


def test_outputs_and_gradients_in_bf16_are_bf16_and_those_of_the_equation(name):
    inputs = _inputs(name, torch.bfloat16)
    assert CASES[name].fused(*inputs).dtype == torch.bfloat16
    _assert_equal(name, inputs, 2**-6)


def test_inputs_and_upstream_gradients_may_be_strided(name):
    inputs = [
        torch.stack((x, x + 1), dim=-1).detach()[..., 0].requires_grad_()
        for x in _inputs(name, torch.float64)
    ]
    assert not any(x.is_contiguous() for x in inputs)
    _assert_equal(name, inputs, 1e-12)
    y = CASES[name].fused(*inputs)
    z, first, second = CASES[name].equation(*inputs), *y.shape[:2]
    for upstream in (
        torch.randn(*y.shape, 2, dtype=torch.float64)[..., 1],
        torch.randn(second, first, *y.shape[2:], dtype=torch.float64).transpose(0, 1),
    ):
        ours = torch.autograd.grad(y, inputs, upstream, retain_graph=True)
        theirs = torch.autograd.grad(z, inputs, upstream, retain_graph=True)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)


def test_an_expanded_gradient_of_a_sum_is_taken_as_it_is(name):
    inputs = _inputs(name, torch.float64)
    ours = torch.autograd.grad(CASES[name].fused(*inputs).sum(), inputs)
    theirs = torch.autograd.grad(CASES[name].equation(*inputs).sum(), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_inputs_and_gradients_are_left_as_they_are(name):
    inputs = _inputs(name, torch.float64)
    before = [x.detach().clone() for x in inputs]
    y = CASES[name].fused(*inputs)
    upstream = torch.randn_like(y)
    kept = upstream.clone()
    torch.autograd.grad(y, inputs, upstream)
    assert torch.equal(upstream, kept)
    assert all(torch.equal(x, b) for x, b in zip(inputs, before, strict=True))
