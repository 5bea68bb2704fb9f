"""Tokens taken out of a sequence and added back, against loops over tokens in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from models.dynamic.token_gather import Selection, add_tokens, gather_tokens
from parallel.context import ParallelContext
from parallel.layers import ColumnParallelLinear, RowParallelLinear
from tests.distributed import run_ranks

SEQ, BATCH, HIDDEN = 8, 3, 4
INDICES = torch.tensor([[0, 3, 4], [1, 2, 7], [5, 6, 7]])
VALID = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])


def _given() -> list[torch.Tensor]:
    """x [s, b, h], gate [s, b], and a weight [h, h] for what happens to chosen tokens."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((SEQ, BATCH, HIDDEN), (SEQ, BATCH), (HIDDEN, HIDDEN))
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def _upstream() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((SEQ, BATCH, HIDDEN), generator=generator, dtype=torch.float64)


def _by_loops(valid: torch.Tensor | None) -> list[torch.Tensor]:
    x, gate, weight = (t.requires_grad_() for t in _given())
    rows = [[x[t, b] for b in range(BATCH)] for t in range(SEQ)]
    for b in range(BATCH):
        for j, t in enumerate(INDICES[b].tolist()):
            if valid is None or valid[b, j]:
                rows[t][b] = x[t, b] + gate[t, b] * (weight @ x[t, b])
    y = torch.stack([torch.stack(row) for row in rows])
    return [y.detach(), *torch.autograd.grad(y, (x, gate, weight), _upstream())]


@pytest.mark.parametrize("valid", [None, VALID])
def test_taking_and_adding_equal_loops_over_tokens(valid):
    ctx, selection = ParallelContext.single(), Selection(INDICES, valid)
    x, gate, weight = (t.requires_grad_() for t in _given())
    y = add_tokens(x, gather_tokens(x, selection, ctx=ctx) @ weight.T, gate, selection, ctx=ctx)
    found = [y.detach(), *torch.autograd.grad(y, (x, gate, weight), _upstream())]
    for value, expected in zip(found, _by_loops(valid), strict=True):
        torch.testing.assert_close(value, expected)


def _on_two_ranks(sequence_parallel: bool, num_chosen: int) -> tuple[list[torch.Tensor], int]:
    """Results on own tokens, and how many numbers all-reduces have moved."""
    ctx = ParallelContext.from_world(tensor=2, sequence_parallel=sequence_parallel)
    rank, size = ctx.tensor.rank, 2 if sequence_parallel else 1
    own = slice(None) if size == 1 else slice(rank * SEQ // 2, (rank + 1) * SEQ // 2)
    x, gate, weight = _given()
    x, gate = (t[own].clone().requires_grad_() for t in (x, gate))
    # Each rank computes its half of the columns of the weight's product, as its own heads.
    whole = ctx if size == 1 else ParallelContext(tensor=ctx.tensor)
    first = ColumnParallelLinear(HIDDEN, HIDDEN, ctx=whole).double()
    second = RowParallelLinear(HIDDEN, HIDDEN, ctx=whole).double()
    with torch.no_grad():
        first.weight.copy_(torch.eye(HIDDEN, dtype=torch.float64).chunk(2)[rank])
        second.weight.copy_(weight.chunk(2, dim=1)[rank])
    selection = Selection(INDICES[:, :num_chosen], VALID[:, :num_chosen])
    moved = 0
    reduce = dist.all_reduce

    def counting(tensor: torch.Tensor, *args, **kwargs):
        nonlocal moved
        moved += tensor.numel()
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = torch.distributed.all_reduce = counting
    y = add_tokens(x, second(first(gather_tokens(x, selection, ctx=ctx))), gate, selection, ctx=ctx)
    gradients = torch.autograd.grad(y, (x, gate, second.weight), _upstream()[own])
    dist.all_reduce = torch.distributed.all_reduce = reduce
    return [y.detach(), *gradients], moved


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_tensor_ranks_equal_one_in_every_gradient(sequence_parallel):
    ranks = [found for found, _ in run_ranks(_on_two_ranks, 2, sequence_parallel, 3)]
    for i, expected in enumerate(_by_loops(VALID)):
        parts = [rank[i] for rank in ranks]
        if i == 3:
            value = torch.cat(parts, dim=1)
        elif sequence_parallel:
            value = torch.cat(parts)
        else:
            torch.testing.assert_close(parts[0], parts[1])
            value = parts[0]
        torch.testing.assert_close(value, expected)


def test_communication_shrinks_with_the_number_of_chosen_tokens():
    for num_chosen in (1, 2, 3):
        for _, moved in run_ranks(_on_two_ranks, 2, True, num_chosen):
            # Forward: the tokens, the sum of the linear layers. Backward: what they became, and
            # the gradient of the input of the linear layers.
            assert moved == 4 * num_chosen * BATCH * HIDDEN
