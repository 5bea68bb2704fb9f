"""torch's own FP8 kernels compute what the emulation computes."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from parallel.context import ParallelContext
from parallel.fp8.emulation import fp8_product
from parallel.fp8.scaled import scaled_product
from parallel.layers import ColumnParallelLinear
from parallel.precision import Precision
from tests.refusals import assert_refused

SHAPE, OUT = (16, 4, 64), 96


def _operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entries of very different size, so that scales matter; outputs of a size of their own."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(SHAPE, generator=generator) * 30
    weight = torch.randn(OUT, SHAPE[-1], generator=generator) / 500
    gradient = torch.randn(*SHAPE[:-1], OUT, generator=generator) * 1e-4
    return x.to(dtype), weight.to(dtype), gradient.to(dtype)


def _measured(product, dtype: torch.dtype, **changes: float) -> list[torch.Tensor]:
    x, weight, gradient = _operands(dtype)
    if "x" in changes:
        x[3, 1, 7] = changes["x"]
    x.requires_grad_()
    weight.requires_grad_()
    y = product(x, weight)
    y.backward(gradient)
    return [y.detach(), x.grad, weight.grad]


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float32, 16)])
def test_result_and_both_gradients_are_those_of_the_emulation(dtype, bits):
    """The kernels round to the dtype once; to fp32 they sum in another order."""
    emulated = partial(fp8_product, recipe="tensorwise")
    found, expected = _measured(scaled_product, dtype), _measured(emulated, dtype)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.dtype, ours.shape) == (dtype, theirs.shape)
        assert (ours - theirs).abs().max() <= theirs.abs().max() * 2.0**-bits
    exact = _measured(torch.nn.functional.linear, torch.float32)[0]
    assert (found[0] - exact).norm() > 1e-3 * exact.norm(), "not in 8 bits"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_result_and_the_gradient_of_the_weight(value):
    y, _, of_weight = _measured(scaled_product, torch.bfloat16, x=value)
    assert y.isnan().all()
    assert of_weight.isnan().all()


def test_nothing_but_zeros_stays_zero():
    x = torch.zeros(SHAPE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(OUT, SHAPE[-1], dtype=torch.bfloat16, requires_grad=True)
    y = scaled_product(x, weight)
    y.sum().backward()
    assert not y.any()
    assert not x.grad.any()
    assert not weight.grad.any()


def test_layers_use_it_for_the_one_recipe_that_it_has():
    ctx = ParallelContext.single(precision=Precision("fp8", "tensorwise", "torch"))
    layer = ColumnParallelLinear(SHAPE[-1], OUT, ctx=ctx, bias=True)
    x, weight, _ = _operands(torch.float32)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.fill_(0.5)
    assert torch.equal(layer(x), scaled_product(x, weight) + 0.5)
    with assert_refused("fp8_backend", value="'torch'", constraint="tensorwise", remedy="use"):
        Precision("fp8", "mxfp8", "torch")
    with assert_refused("FP8 product", value=24, constraint="multiple of 16", remedy="change"):
        layer(torch.zeros(24, 1, SHAPE[-1]))
