"""The history of earlier layers: what a layer reads of it, and what it adds.

Shapes: b batch, s queries, T keys up to the last query, n query heads, g key and value heads, d
head dimension, w layers that are read. All heads are those of this tensor rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.amrpa.config import AMRPALlamaConfig
from models.amrpa.targets import MemoryPlan, live_after
from models.common.attention import attention
from parallel.precision import at_least_fp32, fp32_or_wider

# Tensors that a layer leaves, by `history_kind`.
ENTRY_SIZES = {"qk": 2, "pattern": 1, "context": 1}


class Part(NamedTuple):
    """The part of a layer: `reads`, entries of the incoming history that it reads, nearest first;
    `keeps`, those that it hands on; `leaves`, whether it adds an entry of its own."""

    layer: int
    reads: tuple[int, ...]
    keeps: tuple[int, ...]
    leaves: bool


def part_of(layer: int, plan: MemoryPlan) -> Part | None:
    """The part of one layer in the memory; None where it has none and no history passes it."""
    before, after = live_after(plan, layer - 1), live_after(plan, layer)
    reads = tuple(before.index(i) for i in plan.reads.get(layer, ()))
    keeps = tuple(before.index(i) for i in after if i != layer)
    if not (before or after):
        return None
    return Part(layer, reads, keeps, layer in after)


def entries(history: Sequence[Tensor], kind: str) -> list[tuple[Tensor, ...]]:
    """The history as one tuple of tensors per remembered layer."""
    size = ENTRY_SIZES[kind]
    return [tuple(history[i : i + size]) for i in range(0, len(history), size)]


def transported(
    entry: tuple[Tensor, ...], v: Tensor, positions: Tensor | None, kind: str
) -> Tensor:
    """`u = A V`, an earlier layer's pattern over the values [b, g, T, d] of this one, [b, n, s, d];
    with `context` what that layer made of its own values."""
    if kind == "context":
        return entry[0]
    if kind == "pattern":
        (pattern,) = entry
        return pattern @ v.repeat_interleave(pattern.shape[1] // v.shape[1], dim=1)
    q, k = entry
    return attention(q, k, v, positions)


def left(
    config: AMRPALlamaConfig,
    q: Tensor,
    k: Tensor,
    mixed: Tensor,
    positions: Tensor | None,
) -> tuple[Tensor, ...]:
    """The part that a layer leaves of its rotated queries and keys and its mixed values."""
    if config.detach_history:
        q, k, mixed = q.detach(), k.detach(), mixed.detach()
    if config.history_kind == "context":
        return (mixed,)
    if config.history_kind == "qk":
        return (q, k)
    units = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
    return (attention(q, k, units.expand(*k.shape[:2], -1, -1), positions),)


def visible_mean(v: Tensor, num_queries: int, positions: Tensor | None) -> Tensor:
    """Mean of the values that each of the last `num_queries` queries sees: [b, g, T, d] to
    [b, g, s, d], in fp32."""
    if num_queries == 1 and positions is None:  # a step of a generation
        return v.mean(dim=2, keepdim=True, dtype=fp32_or_wider(v.dtype))
    own = at_least_fp32(v[:, :, -num_queries:])
    earlier = v.shape[2] - num_queries
    totals = own.cumsum(dim=2) + at_least_fp32(v[:, :, :earlier]).sum(dim=2, keepdim=True)
    counts = torch.arange(earlier + 1, v.shape[2] + 1, device=v.device)
    if positions is None:
        return totals / counts.unsqueeze(-1)
    starts = (counts - 1 - positions).view(positions.shape[0], 1, -1, 1)
    before = F.pad(totals, (0, 0, 1, 0)).gather(2, starts.expand_as(totals))
    return (totals - before) / (positions + 1).view(positions.shape[0], 1, -1, 1)
