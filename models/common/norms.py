"""Normalisation layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from parallel.context import ParallelContext
from parallel.regions import sum_for_tensor_ranks
from parallel.sharding import Constant, Sharding, declare, declare_replicated


class RMSNorm(nn.Module):
    """`y = weight * x / sqrt(mean(x^2) + eps)` over the last dimension, in fp32 inside.

    Every tensor rank holds the whole weight. Source: arXiv 1910.07467.

    `zero_centered_gamma`: the gain is `1 + weight`, and the weight starts at 0.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float,
        ctx: ParallelContext,
        zero_centered_gamma: bool = False,
    ) -> None:
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.weight = nn.Parameter(torch.empty(hidden_size, device=ctx.device))
        declare_replicated(self.weight, Constant(0.0 if zero_centered_gamma else 1.0), ctx=ctx)

    def forward(self, x: Tensor) -> Tensor:
        if not self.zero_centered_gamma:
            return rms_norm(x, self.weight, eps=self.eps)
        gain = 1 + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        if gain.dtype == x.dtype:
            return rms_norm(x, gain, eps=self.eps)
        return (x * inverse_rms(x, eps=self.eps) * gain).to(x.dtype)


class HeadNorm(nn.Module):
    """`RMSNorm` over the dimensions of each head, with one gain [d] for all heads.

    Tensor ranks hold different heads, so that each has a part of the gradient.
    Source: arXiv 2010.04245, with a gain as in Qwen3 (arXiv 2505.09388).
    """

    def __init__(self, head_dim: int, *, eps: float, ctx: ParallelContext) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(head_dim, device=ctx.device))
        declare(self.weight, Sharding(partial_gradient=True), Constant(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


class AllHeadsNorm(nn.Module):
    """`RMSNorm` over the dimensions of all heads together, with a gain for each: [s, b, n d].

    Tensor ranks hold n/t heads and their gains, and sum the squares of their heads. Source: OLMo 2
    (arXiv 2501.00656).
    """

    def __init__(self, num_heads: int, head_dim: int, *, eps: float, ctx: ParallelContext) -> None:
        super().__init__()
        self.eps, self.ctx = eps, ctx
        self.size = num_heads * head_dim
        self.weight = nn.Parameter(torch.empty(self.size // ctx.tensor.size, device=ctx.device))
        declare(self.weight, Sharding(dim=0, full_size=self.size), Constant(1.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.ctx.tensor.size == 1:
            return rms_norm(x, self.weight, eps=self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = sum_for_tensor_ranks(wide.square().sum(-1, keepdim=True), ctx=self.ctx)
        return (wide * (squares / self.size + self.eps).rsqrt() * self.weight).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension; None stands for ones."""
    if weight is not None and x.device.type == "cpu" and x.dtype == torch.float32:
        if not torch.is_grad_enabled():
            return (x * inverse_rms(x, eps=eps)).mul_(weight)
        # There torch decomposes it into small operations, which doubles the time of backward.
        normed: Tensor = _RMSNorm.apply(x, weight, eps)
        return normed
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def inverse_rms(x: Tensor, *, eps: float) -> Tensor:
    """`1 / sqrt(mean(x^2) + eps)` over the last dimension, kept with size 1, in fp32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).square()
    return (squares / x.shape[-1] + eps).rsqrt()


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + eps) and n elements:

    `dx = r (g w) - x r^3 / n sum(g w x)`, `dw = sum r g x`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = inverse_rms(x, eps=eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        products = g * x
        weight_gradient = torch.mv(products.flatten(0, -2).T, inverse.flatten())
        along = (products @ weight).unsqueeze(-1)
        gradient = (g * weight).mul_(inverse)
        gradient.addcmul_(x, along * inverse.pow(3), value=-1.0 / x.shape[-1])
        return gradient, weight_gradient, None
