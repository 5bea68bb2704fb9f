"""Rounding to FP8 against tables of the formats, and products against loops over blocks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from parallel.fp8.emulation import E4M3, E5M2, SCALINGS, fp8_product, rounded
from tests.tolerance import assert_close, rounding

RECIPES = tuple(SCALINGS)


def _numbers(exponent_bits: int, mantissa_bits: int, largest: float) -> list[float]:
    """Every number that is at least 0, from the definition of the format."""
    bias = 2 ** (exponent_bits - 1) - 1
    steps = 2**mantissa_bits
    values = {
        math.ldexp(m / steps + (e > 0), max(e, 1) - bias)
        for e, m in itertools.product(range(2**exponent_bits), range(steps))
    }
    return sorted(value for value in values if value <= largest)


FORMATS = {E4M3: _numbers(4, 3, 448.0), E5M2: _numbers(5, 2, 57344.0)}


def _nearest(value: float, numbers: list[float]) -> set[float]:
    """The closest of the numbers, with its sign; both where the value is half way between two."""
    distance = min(abs(abs(value) - number) for number in numbers)
    closest = [number for number in numbers if abs(abs(value) - number) == distance]
    return {math.copysign(number, value) for number in closest}


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_entry_becomes_the_closest_number_of_the_format(dtype):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.linspace(-30, 0, 400)
    x = torch.randn(400, generator=generator).sign() * torch.exp2(exponents)
    x[-1] = 1.0  # the largest: the scale is the largest number of the format
    largest = FORMATS[dtype][-1]
    found = rounded(x.view(1, -1), dtype, None, power_of_two=False).flatten() * largest
    for value, own in zip((x * largest).tolist(), found.tolist(), strict=True):
        assert any(
            own == pytest.approx(n, rel=1e-6, abs=0) for n in _nearest(value, FORMATS[dtype])
        )


def _block_by_block(x, dtype, rows, columns, *, power_of_two):
    """The rounded operand in fp64, one block after another."""
    result = torch.empty(x.shape, dtype=torch.float64)
    for i, j in itertools.product(range(0, x.shape[0], rows), range(0, x.shape[1], columns)):
        block = x[i : i + rows, j : j + columns]
        scale = torch.tensor(FORMATS[dtype][-1]) / block.abs().max()
        if power_of_two:
            scale = torch.tensor(2.0 ** math.floor(math.log2(scale.item())))
        limit = FORMATS[dtype][-1]
        eighths = (block * scale).clamp(-limit, limit).to(dtype)
        result[i : i + rows, j : j + columns] = (eighths.float() / scale).double()
    return result


# Formats of inputs and weights, and of gradients; blocks of both and of weights; powers of 2.
OF_RECIPES = {
    "tensorwise": (E4M3, E5M2, (999, 999), (999, 999), False),
    "blockwise": (E4M3, E4M3, (1, 128), (128, 128), True),
    "mxfp8": (E4M3, E4M3, (1, 32), (1, 32), True),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_three_products_round_along_the_dimension_that_they_sum_over(recipe):
    """Sizes that no block divides; entries of very different size, so that scales matter."""
    forward, backward, block, weight_block, power = OF_RECIPES[recipe]
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        sizes = torch.exp2(torch.randint(-6, 3, shape, generator=generator))
        return torch.randn(shape, generator=generator) * sizes

    x, weight, gradient = draw(7, 20, 150), draw(140, 150), draw(7, 20, 140)
    x.requires_grad_(), weight.requires_grad_()
    y = fp8_product(x, weight, recipe)
    y.backward(gradient)
    rows, g, w = x.detach().flatten(0, 1), gradient.flatten(0, 1), weight.detach()

    def q(operand, dtype, blocks=block):
        return _block_by_block(operand, dtype, *blocks, power_of_two=power)

    expected = (
        (y.detach(), (q(rows, forward) @ q(w, forward, weight_block).T).view_as(y)),
        (x.grad, (q(g, backward) @ q(w.T, forward, weight_block).T).view_as(x)),
        (weight.grad, q(g.T, backward) @ q(rows.T, forward).T),
    )
    for found, exact in expected:
        assert_close(found.double(), exact, rounding(torch.float32, depth=1, length=150))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_not_finite_reaches_results_and_both_gradients(recipe, value):
    x, weight = torch.ones(32, 64), torch.ones(64, 64)
    broken = x.clone()
    broken[3, 5] = value
    assert not fp8_product(broken, weight, recipe).isfinite().all()
    x.requires_grad_(), weight.requires_grad_()
    fp8_product(x, weight, recipe).backward(broken)
    assert not x.grad.isfinite().all()
    assert not weight.grad.isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_but_zeros_stays_zero_and_no_entry_becomes_infinite(recipe):
    scaling = SCALINGS[recipe]
    for x in (torch.zeros(3, 40), torch.full((3, 40), 3e38), torch.full((3, 40), 1e-45)):
        for dtype in (scaling.forward, scaling.backward):
            block = scaling.activation_block
            found = rounded(x, dtype, block, power_of_two=scaling.power_of_two)
            torch.testing.assert_close(found, x, rtol=2**-4, atol=1e-44)
