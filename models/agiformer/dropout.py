"""Dropout whose numbers are the same at every layout.

Shapes: p patches, b batch, t tensor size.
"""

from __future__ import annotations

from torch import Tensor

from models.common.counter_rng import dropout
from parallel.context import ParallelContext
from parallel.regions import local_sequence


def dropped(
    x: Tensor, keys: Tensor, probability: float, *, stream: int, ctx: ParallelContext
) -> Tensor:
    """Dropout of x [p/t, b, channels] for keys int64 [b, p], the carry's."""
    return dropout(x, local_sequence(keys.T, ctx=ctx), probability, stream=stream)
