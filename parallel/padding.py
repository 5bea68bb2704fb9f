"""Means over padded rows of a batch."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_of_tokens(x: Tensor, lengths: Tensor | None) -> Tensor:
    """The mean of every row over its tokens, the first `lengths` int64 [b] or all: [s, b, ...] ->
    [b, ...]."""
    if lengths is None:
        return x.mean(dim=0)
    trailing = (1,) * (x.dim() - 2)
    there = torch.arange(len(x), device=x.device).unsqueeze(1) < lengths
    return x.where(there.view(*there.shape, *trailing), 0.0).sum(dim=0) / lengths.view(
        -1, *trailing
    )
