"""Functions with gradients of their own, against their equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from models.common.manual_backward import multiply_add, scaled_heads, weighted_sum
from models.daria_former.manual_backward import mix_paths

EPS = 1e-2


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


CASES = {
    "scaled_heads": Case(
        scaled_heads, lambda x, gain: (gain * x).permute(1, 2, 0, 3), ((5, 2, 3, 4), (3, 4))
    ),
    "multiply_add": Case(
        lambda a, b, c: multiply_add(a, b, c, scale=0.3),
        lambda a, b, c: a + 0.3 * b * c,
        ((3, 2, 4),) * 3,
    ),
    "weighted_sum": Case(
        lambda w, *parts: weighted_sum(parts, w),
        lambda w, *parts: sum(w[..., i : i + 1] * part for i, part in enumerate(parts)),
        ((3, 2, 3), *((3, 2, 4),) * 3),
        fp32=(0,),
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
    upstream = torch.randn_like(expected).to(found.dtype)
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
    upstream = torch.randn(*y.shape, 2, dtype=torch.float64)[..., 1]
    expected = torch.autograd.grad(CASES[name].equation(*inputs), inputs, upstream)
    for mine, other in zip(torch.autograd.grad(y, inputs, upstream), expected, strict=True):
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
