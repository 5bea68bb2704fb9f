"""Attention of a diffusion stream's blocks: merged parts beside masks, and causal attention.

One forward and backward pass of the attention alone, fp32, over rows of one document and over
packed ones. The causal kernel sees as much of the context, and no documents and no block: a floor,
not a goal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from models.common.attention import causal_attention
from models.common.cache import KeysValues
from models.dart.attention import find_blocks, masked_block_attention
from models.dart.merged_attention import merged_block_attention
from tests.benchmarks.timing import Table, interleaved, ratio

HEADS, HEAD_DIM, SIZE = 4, 64, 16
LENGTHS, DOCUMENT = (512, 2048), 300
ROUNDS, WARMUP = 5, 1


def tables() -> Iterator[Table]:
    """Ratios of time by length, of plain and of packed rows."""
    rows = []
    for length in LENGTHS:
        for kind in ("plain", "packed"):
            seconds = interleaved(_contestants(length, kind), rounds=ROUNDS, warmup=WARMUP)
            rows.append(
                (
                    f"{length:,} places, {kind}",
                    ratio(seconds, "merged", "masked"),
                    ratio(seconds, "merged", "causal"),
                )
            )
    yield Table("Merged parts", ("", "faster than masks", "than the causal kernel"), rows)


def _contestants(length: int, kind: str) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, length, HEAD_DIM)
    q, *rest = (torch.randn(shape, generator=generator, requires_grad=True) for _ in range(5))
    context, own = KeysValues(*rest[:2]), KeysValues(*rest[2:])
    positions = torch.arange(length).int().unsqueeze(0) % DOCUMENT if kind == "packed" else None
    blocks = find_blocks(torch.rand(1, length, generator=generator) < 0.5, positions, size=SIZE)

    def pass_of(attend: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: attend().sum().backward()

    return {
        "merged": pass_of(lambda: merged_block_attention(q, context, own, blocks)),
        "masked": pass_of(lambda: masked_block_attention(q, context, own, blocks)),
        "causal": pass_of(lambda: causal_attention(q, *context)),
    }
