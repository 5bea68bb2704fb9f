"""The carry of an AGIFORMER.

Shapes: s bytes, p patches, b batch, h hidden, V vocabulary, t tensor size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from models.common.counter_rng import dropout
from parallel.context import ParallelContext
from parallel.regions import local_sequence


class AgiformerCarry(NamedTuple):
    """The carry between the layers.

    `hidden`: a latent for every patch [p, b, h], [p/t, b, h] under sequence parallelism. `aux`:
    fp32 [b, len(AUX)], losses and measurements of every row. `tokens`: int64 [b, s], the bytes,
    which the head conditions on. `positions`: int32 [b, s], from 0 in every document, and
    `patch_positions`: int32 [b, p]; None where a row is one document. `keys`: int64 [b, p], what
    the next layer draws dropout from (models.common.counter_rng); None without dropout.
    """

    hidden: Any
    aux: Any
    tokens: Any
    positions: Any = None
    patch_positions: Any = None
    keys: Any = None


class AgiformerOutput(NamedTuple):
    """`logits` [s, b, V/t]. `aux` as in the carry. `places` int64 [b or 1, s]: the place in its
    patch, 0 to P - 1, of the byte that each logit predicts."""

    logits: Tensor
    aux: Tensor
    places: Tensor


# Entries of `aux`, per row: the ponder cost N + R and the number of steps N, as means over its
# patches; the documents beyond `documents_per_row`, which continue the last one before them.
AUX = ("ponder_loss", "ponder_steps", "merged_documents")


def dropped(
    x: Tensor, keys: Tensor, probability: float, *, stream: int, ctx: ParallelContext
) -> Tensor:
    """Dropout of x [p/t, b, channels] for keys int64 [b, p], the carry's."""
    return dropout(x, local_sequence(keys.T, ctx=ctx), probability, stream=stream)
