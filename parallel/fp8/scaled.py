"""Products of operands in FP8 by torch's own kernels, where there is no Transformer Engine.

The recipe `tensorwise` of `emulation`: the same rounded operands, multiplied by `torch._scaled_mm`
(2.5 to 2.13), which CUDA has since Ada and a CPU to try it. What is saved for the backward pass has
8 bits. Kernels take the first operand by rows and the second by columns, of multiples of 16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel.fp8.emulation import E4M3, E5M2

RECIPE = "tensorwise"
MULTIPLE = 16


class Scaled(NamedTuple):
    """`values * inverse`, with values [m, k] in FP8 and one inverse scale in fp32."""

    values: Tensor
    inverse: Tensor

    @property
    def T(self) -> Scaled:
        """The transpose, by rows."""
        return Scaled(self.values.t().contiguous(), self.inverse)


def scaled(x: Tensor, dtype: torch.dtype) -> Scaled:
    """x in FP8, with the scale that makes its largest entry the largest number of the format.

    Not finite anywhere, it is NaN everywhere, so that the step is found to be bad.
    """
    largest = torch.finfo(dtype).max
    entry = x.abs().amax().float()
    scale = (largest / entry).clamp(max=torch.finfo(torch.float32).max)
    scale = torch.where(entry > 0, scale, 1.0)
    scale = torch.where(entry.isfinite(), scale, torch.nan)
    values = (x.float() * scale).clamp(-largest, largest).to(dtype)
    return Scaled(values, scale.reciprocal())


def scaled_product(x: Tensor, weight: Tensor) -> Tensor:
    """`x W^T` of x [..., in] and W [out, in] with operands in FP8, forward and backward.

    The result and both gradients have the dtypes of x and W.
    """
    product: Tensor = _Product.apply(x, weight)
    return product


def _multiply(a: Scaled, b: Scaled, dtype: torch.dtype, *, is_gradient: bool) -> Tensor:
    """`a b^T` of a [m, k] and b [n, k]. Gradients are promoted from Hopper's 14 bits on the way."""
    product: Tensor = torch._scaled_mm(
        a.values,
        b.values.t(),
        scale_a=a.inverse,
        scale_b=b.inverse,
        out_dtype=dtype,
        use_fast_accum=not is_gradient,
    )
    return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows, matrix = scaled(x.flatten(0, -2), E4M3), scaled(weight, E4M3)
        ctx.save_for_backward(*rows, *matrix)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype)
        return _multiply(rows, matrix, x.dtype, is_gradient=False).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        saved = ctx.saved_tensors
        rows, matrix = Scaled(*saved[:2]), Scaled(*saved[2:])
        outer = scaled(gradient.flatten(0, -2), E5M2)
        of_input, of_weight = None, None
        if ctx.needs_input_grad[0]:
            of_input = _multiply(outer, matrix.T, ctx.dtypes[0], is_gradient=True).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            of_weight = _multiply(outer.T, rows.T, ctx.dtypes[1], is_gradient=True)
        return of_input, of_weight
