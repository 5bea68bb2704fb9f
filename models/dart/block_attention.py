"""The form of the diffusion stream's attention that a call has."""

from __future__ import annotations

import torch
from torch import Tensor

from models.common.cache import KeysValues
from models.common.flex import has_kernel
from models.dart.attention import Blocks, masked_block_attention
from models.dart.flex import flex_block_attention
from models.dart.merged_attention import merged_block_attention


def block_attention(
    q: Tensor, context: KeysValues, own: KeysValues, blocks: Blocks, *, is_cached: bool
) -> Tensor:
    """Mix the values that every place sees (models.dart.attention): q [b, n, s, d] -> same.

    `context`: the causal stream from place 0 on, [b, g, c, d]. `own`: the diffusion stream from
    place `blocks.own_first` on, [b, g, o, d]. On CPU the merged form, on CUDA FlexAttention. Behind
    a cache, in fp64 or with heads below 16 on CUDA, and on other devices chunks of queries have a
    mask.
    """
    # The program of an export has no kernel of one processor in it.
    if is_cached or torch.compiler.is_exporting():
        return masked_block_attention(q, context, own, blocks)
    if q.device.type == "cpu":
        return merged_block_attention(q, context, own, blocks)
    if has_kernel(q):
        return flex_block_attention(q, context, own, blocks)
    return masked_block_attention(q, context, own, blocks)
