"""Calls of torch's attention kernels, with what those on CUDA ask of their operands.

Shapes: s queries, T keys, b batch, n query heads, g key/value heads, d head dimension. q is
[b, n, s, d], k and v are [b, g, T, d]; query head i uses key head `i // (n / g)`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_ALIGNMENT = 8  # elements of 2 bytes in the 16 bytes that kernels load at once


def unmasked_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` over all keys, or with s = T over those up to the query."""
    k, v = _loadable(k), _loadable(v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=_is_grouped(q, k))


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` over the keys of a boolean mask [.., s, T]."""
    # The backward pass of cuDNN gives NaN at these numbers of keys with a mask (torch 2.11 to 2.13,
    # pytorch issue 196678).
    if q.device.type == "cuda" and k.shape[2] % 128 == 64:
        k, v, mask = with_hidden_keys(k, v, mask, 64)
    k, v = _loadable(k), _loadable(v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=_is_grouped(q, k))


def with_hidden_keys(
    k: Tensor, v: Tensor, mask: Tensor, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`number` more keys that no query sees; neither result nor gradients change."""
    k, v = (F.pad(x, (0, 0, 0, number)) for x in (k, v))
    return k, v, F.pad(mask, (0, number), value=False)


def _loadable(x: Tensor) -> Tensor:
    return x if x.device.type != "cuda" or is_aligned(x) else x.contiguous()


def is_aligned(x: Tensor) -> bool:
    """Whether every row of x begins at a multiple of 16 bytes (of half precision) and is its own.

    Columns of a joined projection may begin elsewhere. Rows that are expanded over the batch have
    stride 0, with which kernels have been wrong (pytorch issue 191937).
    """
    return (
        all(
            size == 1 or (stride > 0 and stride % _ALIGNMENT == 0)
            for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
        )
        and not x.storage_offset() % _ALIGNMENT
    )


def _is_grouped(q: Tensor, k: Tensor) -> bool:
    return q.shape[1] != k.shape[1]
