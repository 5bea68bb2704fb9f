"""Dispatch of rows to the ranks that hold their experts, and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.context import Axis


def read_counts(counts: Tensor, axis: Axis) -> list[list[list[int]]]:
    """Numbers of rows sent to each rank's experts, and received from each rank for its own."""
    arriving = counts
    if axis.size > 1:
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=axis.group)
    both: list[list[list[int]]] = torch.stack([counts, arriving]).view(2, axis.size, -1).tolist()
    return both


def all_to_all(
    x: Tensor, *, axis: Axis, sent: list[int] | None = None, received: list[int] | None = None
) -> Tensor:
    """Send `sent[r]` rows to each expert rank r and receive `received[r]`; equal parts if None."""
    return x if axis.size == 1 else _AllToAll.apply(x, axis.group, sent, received)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: dist.ProcessGroup | None,
        sent: list[int] | None,
        received: list[int] | None,
    ) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _exchange(x, group, sent, received)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradient, ctx.group, ctx.received, ctx.sent), None, None, None


def _exchange(
    x: Tensor,
    group: dist.ProcessGroup | None,
    sent: list[int] | None,
    received: list[int] | None,
) -> Tensor:
    num_rows = len(x) if received is None else sum(received)
    out = x.new_empty(num_rows, *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


class GatherRows(torch.autograd.Function):
    """Rows `index` of x; an index past the end gives zeros.

    `inverse` [len(x), r] holds the rows of the result that each row of x was copied to, so that
    backward is a gather, too, in a fixed order, where torch's own would use atomic adds.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _rows_of(x, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return _rows_of(gradient, inverse).sum(dim=1), None, None


def _rows_of(x: Tensor, index: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[index]
