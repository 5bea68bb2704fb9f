"""Attention within the documents of a packed row, beside causal attention over a row as long.

Forward and backward, one thread, CPU seconds in turn. Documents that are as long as the row show
what packing costs where it saves nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from models.common.attention import causal_attention, packed_attention
from tests.benchmarks.timing import Table, interleaved, ratio

HEADS, KV_HEADS, HEAD_DIM, ROUNDS = 8, 4, 64, 5
ROWS = ((2048, 500), (8192, 500), (8192, 8192))


def tables() -> Iterator[Table]:
    """How many times faster a packed row is, by its length and that of its documents."""
    torch.set_num_threads(1)
    yield Table(
        f"Attention, forward and backward, {HEADS} heads of {HEAD_DIM}, {KV_HEADS} of keys",
        ("tokens, of a document", "faster than a row without documents"),
        [(f"{length:,}, {document:,}", _faster(length, document)) for length, document in ROWS],
    )


def _faster(length: int, document: int) -> str:
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, heads, length, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(size, generator=generator, requires_grad=True) for size in sizes)
    positions = (torch.arange(length, dtype=torch.int32) % document).unsqueeze(0)

    def step(result: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: result().sum().backward()

    contestants = {
        "packed": step(lambda: packed_attention(q, k, v, positions)),
        "causal": step(lambda: causal_attention(q, k, v)),
    }
    seconds = interleaved(contestants, rounds=ROUNDS, warmup=1, clock=time.process_time)
    return ratio(seconds, "packed", "causal")
