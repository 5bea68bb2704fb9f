"""Products of bf16 on an x86 CPU that has no units for them: in fp32, rounded once.

Both forms add in fp32. torch's own loops over bf16, and the gradient of a product takes 10 to 200
times as long in them as in fp32.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn

MAX_NARROW_ROWS = 32  # up to which torch's product of bf16, without gradients, is as fast

# Where AVX-512 is, oneDNN has kernels of bf16; other processors have units of their own.
_HAS_NO_UNITS = platform.machine().lower() in ("x86_64", "amd64") and (
    torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
)


def is_widened(x: Tensor, *others: Tensor, row_size: int) -> bool:
    """Whether products of these tensors are faster in fp32: of bf16 on this CPU, with gradients or
    of more than a few rows, which have `row_size` elements of x each.

    Tensor subclasses define their own products, autocast would cast back, and an exported program
    is for other processors, too.
    """
    return (
        _HAS_NO_UNITS
        and all(
            type(each) in (Tensor, nn.Parameter)
            and each.dtype == torch.bfloat16
            and each.is_cpu
            and each.layout is torch.strided
            for each in (x, *others)
        )
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()
        and (torch.is_grad_enabled() or x.numel() > MAX_NARROW_ROWS * row_size)
    )


def widened_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b` and its gradients, each rounded once: [..., k], W [n, k], b [n] -> [..., n]; or
    of a batch without bias, [e, m, k], W [e, n, k] -> [e, m, n]. Operands and result exist in fp32
    meanwhile."""
    y: Tensor = _Widened.apply(x, weight, bias)
    return y


class _Widened(torch.autograd.Function):
    # Keeps the operands as they are: of the casts of autograd it would keep copies in fp32.
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = x.float() @ weight.float().mT
        if bias is not None:
            y.add_(bias.float())
        return y.to(x.dtype)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor
    ) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wide = gradient.float()
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = (wide @ weight.float()).to(x.dtype)
        if weight.dim() == 2:
            wide, x = (each.reshape(-1, each.shape[-1]) for each in (wide, x))
        if ctx.needs_input_grad[1]:
            of_weight = (wide.mT @ x.float()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = wide.sum(dim=0).to(ctx.bias_dtype)
        return of_x, of_weight, of_bias
