"""Gather chosen tokens from a sequence and scatter-add their updates back.

A layer that computes only some tokens treats them as a short sequence [k, b, h] that is replicated
on every tensor rank, under the context of `whole_tokens`. Without sequence parallelism gathering
and adding are local. With it each rank holds its own tokens [s/t, b, h]; one all-reduce of
[k, b, h] gathers the chosen tokens of all ranks in forward, and one the gradient of their updates
in backward, so that communication shrinks with the number of chosen tokens.

Shapes: s sequence, b batch, h hidden, k chosen tokens of a row, t tensor size.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.common.marked import marked_first
from parallel.context import ParallelContext
from parallel.regions import copy_to_tensor_region, sum_over_sequence_ranks


class Selection(NamedTuple):
    """The chosen tokens of every row, k per row.

    `indices`: int64 [b, k], distinct positions in the sequence; the valid ones come first and in
    ascending order, so that a causal mask over them is exact. `valid`: bool [b, k], False for
    filler tokens, which are not added back; None if all are valid. `lengths`: int64 [b], the
    number of tokens selected in each row if padded rows select different numbers; else None.
    """

    indices: Tensor
    valid: Tensor | None = None
    lengths: Tensor | None = None


def chosen_first(chosen: Tensor, k: int) -> Selection:
    """Convert a mask bool [b, s] to a selection of k tokens per row, the chosen ones first.

    No row may have more than k chosen tokens; rows with fewer are filled with other tokens.
    """
    order = marked_first(chosen)[:, :k]
    return Selection(order, chosen.gather(1, order))


def whole_tokens(ctx: ParallelContext) -> ParallelContext:
    """The context of layers that compute gathered tokens, which are replicated on tensor ranks."""
    return dataclasses.replace(ctx, sequence_parallel=False)


def gather_tokens(x: Tensor, selection: Selection, *, ctx: ParallelContext) -> Tensor:
    """Gather the chosen tokens of x [s/t, b, h] on every tensor rank: [k, b, h]."""
    rows = _rows(selection, x, ctx=ctx)
    chosen = x.flatten(0, 1).index_select(0, rows.flat)
    if rows.present is not None:
        chosen = chosen.masked_fill(~rows.present.unsqueeze(-1), 0.0)
    chosen = chosen.unflatten(0, (-1, x.shape[1]))
    # The routed layers work without sequence parallelism, so what comes back is the whole gradient.
    return sum_over_sequence_ranks(chosen, ctx=ctx)


def add_tokens(
    x: Tensor, delta: Tensor, gate: Tensor, selection: Selection, *, ctx: ParallelContext
) -> Tensor:
    """`y = x`, and `y_t = x_t + gate_t * delta_j` where t is the j-th chosen token of its row.

    x [s/t, b, h]; delta [k, b, h], replicated on tensor ranks; gate fp32 [s/t, b].
    """
    rows = _rows(selection, x, ctx=ctx)
    weights = gate.flatten().index_select(0, rows.flat)
    for counted in (rows.present, rows.valid):
        if counted is not None:
            weights = weights * counted
    if ctx.sequence_parallel:
        delta = copy_to_tensor_region(delta, ctx=whole_tokens(ctx))
    added: Tensor = _AddRows.apply(x, delta, weights, rows.flat)
    return added


class _RowsOfSequence(NamedTuple):
    """Chosen tokens as rows of `x.flatten(0, 1)`: int64 [k * b], with two masks bool [k * b]: those
    on this rank, and valid ones; None for all."""

    flat: Tensor
    present: Tensor | None
    valid: Tensor | None


def _rows(selection: Selection, x: Tensor, *, ctx: ParallelContext) -> _RowsOfSequence:
    length, batch = x.shape[:2]
    indices, present = selection.indices.T, None
    if ctx.sequence_parallel:
        indices = indices - ctx.tensor.rank * length
        present = ((indices >= 0) & (indices < length)).flatten()
        indices = indices.clamp(0, length - 1)
    index = indices * batch + torch.arange(batch, device=x.device)
    valid = None if selection.valid is None else selection.valid.T.flatten()
    return _RowsOfSequence(index.flatten(), present, valid)


class _AddRows(torch.autograd.Function):
    """`y = x`, `y[rows] += weights * delta`; d weights = sum_h g delta in the dtype of weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        flat = delta.flatten(0, 1)
        ctx.save_for_backward(flat, weights, rows)
        y = x.clone(memory_format=torch.contiguous_format)
        # In place on a view: rows repeat only with weight 0, so that order does not matter.
        y.view(-1, x.shape[-1]).index_add_(0, rows, (flat * weights.unsqueeze(-1)).to(x.dtype))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        flat, weights, rows = ctx.saved_tensors
        chosen = g.flatten(0, 1).index_select(0, rows)
        d_weights = (chosen * flat).sum(dim=-1, dtype=weights.dtype)
        d_delta = (chosen * weights.unsqueeze(-1)).to(flat.dtype)
        return g, d_delta.view(-1, *g.shape[1:]), d_weights, None
