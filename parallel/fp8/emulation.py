"""Products of operands in FP8, computed in fp32 on any device.

An FP8 operand is `q(x) = fp8(c x) / c` with the scale c of its block, such that the block's largest
entry becomes the largest number of the format. The three products of a linear layer round their
operands along the dimension that they sum over, as Transformer Engine's do:

    y  = q(x) q(W)^T        sum over features
    dx = q(dy) q(W)         sum over output features
    dW = q(dy)^T q(x)       sum over tokens

and accumulate in fp32. A product of two FP8 numbers is exact in fp32, so that kernels differ in the
order of the sum alone, and in the 14 bits with which Hopper accumulates unless it is told to
promote. Recipes: NVIDIA's (Transformer Engine 2.20); blocks as in DeepSeek-V3 (arXiv 2412.19437)
and in the OCP microscaling formats 1.0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Block = tuple[int, int]


class Scaling(NamedTuple):
    """Formats and blocks of a recipe; a block of None is the whole tensor.

    Blocks are rows x columns of an operand whose columns are summed over. `power_of_two`: scales
    are rounded down to powers of 2, so that scaling itself rounds nothing.
    """

    forward: torch.dtype
    backward: torch.dtype
    activation_block: Block | None
    weight_block: Block | None
    power_of_two: bool


SCALINGS = {
    "tensorwise": Scaling(E4M3, E5M2, None, None, False),
    "blockwise": Scaling(E4M3, E4M3, (1, 128), (128, 128), True),
    "mxfp8": Scaling(E4M3, E4M3, (1, 32), (1, 32), True),
}


def rounded(x: Tensor, dtype: torch.dtype, block: Block | None, *, power_of_two: bool) -> Tensor:
    """`fp8(c x) / c` in fp32 with one scale c for each block of x [m, k]; zero blocks stay zero.

    A block with an entry that is not finite becomes NaN, so that the step is found to be bad.
    """
    x = x.float()
    largest = torch.finfo(dtype).max
    entries = _largest_entries(x.abs(), block)
    scale = (largest / entries).clamp(max=torch.finfo(torch.float32).max)
    scale = torch.where(entries > 0, scale, 1.0)
    if power_of_two:
        scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)
    scale = torch.where(entries.isfinite(), scale, torch.nan)
    # A conversion to float8_e4m3fn gives NaN beyond its range; rounding of the scale may reach it.
    return (x * scale).clamp(-largest, largest).to(dtype).float() / scale


def _largest_entries(x: Tensor, block: Block | None) -> Tensor:
    """The largest entry of the block of each entry of x [m, k]; the last blocks may be smaller."""
    if block is None:
        return x.amax().expand_as(x)
    rows, columns = block
    padded = F.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    largest = blocks.amax(dim=(1, 3), keepdim=True).expand_as(blocks)
    return largest.flatten(2, 3).flatten(0, 1)[: x.shape[0], : x.shape[1]]


def fp8_product(x: Tensor, weight: Tensor, recipe: str) -> Tensor:
    """`x W^T` of x [..., in] and W [out, in] with operands in FP8, forward and backward.

    The result and both gradients have the dtypes of x and W.
    """
    product: Tensor = _Product.apply(x, weight, SCALINGS[recipe])
    return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scaling: Scaling) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scaling = scaling
        y = _activation(x.flatten(0, -2), scaling.forward, scaling) @ _weight(weight, scaling).T
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        scaling: Scaling = ctx.scaling
        rows = gradient.flatten(0, -2)
        of_input, of_weight = None, None
        if ctx.needs_input_grad[0]:
            of_input = _activation(rows, scaling.backward, scaling) @ _weight(weight.T, scaling).T
            of_input = of_input.to(x.dtype).view_as(x)
        if ctx.needs_input_grad[1]:
            tokens = x.flatten(0, -2).T
            of_weight = (
                _activation(rows.T, scaling.backward, scaling)
                @ _activation(tokens, scaling.forward, scaling).T
            ).to(weight.dtype)
        return of_input, of_weight, None


def _activation(x: Tensor, dtype: torch.dtype, scaling: Scaling) -> Tensor:
    return rounded(x, dtype, scaling.activation_block, power_of_two=scaling.power_of_two)


def _weight(weight: Tensor, scaling: Scaling) -> Tensor:
    return rounded(weight, scaling.forward, scaling.weight_block, power_of_two=scaling.power_of_two)
