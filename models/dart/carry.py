"""The carry of the dart family.

Shapes: s sequence, b batch, h hidden, T noise levels, V vocabulary, t tensor size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class DARTCarry(NamedTuple):
    """Both streams, [s, b, h] each, or [s/t, b, h] under sequence parallelism.

    `hidden`: the causal stream. `noised`: the diffusion stream. `modulation`: [T + 1, 6 h], by
    noise level, or [1, 1 or b, 6 h] where a row has one. `levels` int32 [b, s] and `targets` int32
    [b, s] as in `models.dart.noise.Noise`. `positions`: int32 [b, s], from 0 where the visible
    context begins; None where that is the row.
    """

    hidden: Any
    noised: Any
    modulation: Any
    levels: Any
    targets: Any
    positions: Any = None


class DARTOutput(NamedTuple):
    """`logits` of the causal stream and `draft_logits` of the diffusion stream, [s, b, V/t] each:
    of token i + 1 at place i; with a cache one of them is None. `levels`, `targets`: as in the
    carry."""

    logits: Any
    draft_logits: Any
    levels: Tensor
    targets: Tensor
