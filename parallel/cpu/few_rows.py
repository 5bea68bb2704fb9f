"""Products of few rows with a large weight, as in decoding, on a CPU.

The time of such a product is that of reading the weight. MKL's product of two matrices reads it on
one thread for one row, and for several rows at half the speed of the memory or less.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_ROWS = 32
# Elements of a weight from which more time is saved than the additional calls take: smaller ones
# also stay in the caches.
LEAST_WEIGHT = 1 << 19


def is_few_rows_product(x: Tensor, weight: Tensor) -> bool:
    """Whether `few_rows_product` is a faster form of `x W^T`: on a CPU, in fp32 or fp64.

    Its backward pass is not: it is for calls without gradient.
    """
    if type(weight) is not nn.Parameter or type(x) is not Tensor:
        return False  # tensor subclasses, quantised ones for instance, define their own product
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False  # a program for any number of rows
    if weight.numel() < LEAST_WEIGHT:  # also one that ZeRO-3 has not gathered yet
        return False
    num_rows = x.numel() // weight.shape[-1]
    return (
        0 < num_rows <= MAX_ROWS
        # One row is read as fast by MKL's product on one thread.
        and weight.numel() >= (LEAST_WEIGHT if num_rows > 1 else 2 * LEAST_WEIGHT)
        and (num_rows > 1 or torch.get_num_threads() > 1)
        and x.is_cpu
        and weight.is_cpu
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and weight.layout is torch.strided  # sparse ones, of pruned models, have their own product
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkl.is_available()  # elsewhere a batch is a loop of single products
    )


def few_rows_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b` for few rows: [..., k], W [n, k] -> [..., n], within the rounding of a product.

    A batch of products with 16 or 32 rows of W each, which MKL spreads over the threads.
    """
    rows = x.reshape(-1, x.shape[-1])
    size = 16 if len(rows) <= 16 else 32
    stop = len(weight) - len(weight) % size
    parts = weight[:stop].view(-1, size, weight.shape[1])
    products = torch.bmm(rows.expand(len(parts), -1, -1), parts.mT)
    y = products.transpose(0, 1).reshape(len(rows), stop)
    if stop < len(weight):
        y = torch.cat((y, F.linear(rows, weight[stop:])), dim=1)
    if bias is not None:
        y = y + bias
    return y.view(*x.shape[:-1], len(weight))
