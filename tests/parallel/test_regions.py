"""Every region at two tensor ranks, against the whole tensor in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from parallel.context import ParallelContext
from parallel.regions import (
    all_reduced,
    copy_to_tensor_region,
    gather_sequence,
    local_sequence,
    scale_replicated_grad,
    sum_over_sequence_ranks,
    sum_over_tensor_ranks,
)
from tests.distributed import run_ranks

FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    f.__name__: f
    for f in (
        gather_sequence, local_sequence, copy_to_tensor_region, sum_over_tensor_ranks,
        sum_over_sequence_ranks, scale_replicated_grad,
    )
}  # fmt: skip
WHOLE = torch.arange(24.0).view(4, 2, 3)


def _values(rank: int, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


def _input(name: str, rank: int, *, sequence_parallel: bool) -> torch.Tensor:
    """Own tokens where the function takes them, a part of a sum, or a tensor equal on all ranks."""
    if name == "gather_sequence" and sequence_parallel:
        return WHOLE.chunk(2)[rank].clone()
    if name.startswith("sum_over"):
        return _values(rank, WHOLE.shape)
    return WHOLE.clone()


def _run(name: str, sequence_parallel: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ctx = ParallelContext.from_world(tensor=2, sequence_parallel=sequence_parallel)
    rank = ctx.tensor.rank
    x = _input(name, rank, sequence_parallel=sequence_parallel).requires_grad_()
    given = x.detach().clone()
    y = FUNCTIONS[name](x, ctx=ctx)
    upstream = _values(10 + rank, y.shape)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(x, given)
    assert torch.equal(upstream, _values(10 + rank, y.shape))
    return y.detach(), upstream, gradient


def _expected(name: str, sequence_parallel: bool, upstream: list[torch.Tensor]) -> Any:
    """(values, gradients) per rank, from the docstrings."""
    inputs = [_input(name, r, sequence_parallel=sequence_parallel) for r in (0, 1)]
    same = inputs, upstream
    total = [inputs[0] + inputs[1]] * 2
    if name == "sum_over_tensor_ranks":
        return total, upstream
    if name == "sum_over_sequence_ranks":
        return (total, upstream) if sequence_parallel else same
    if name == "copy_to_tensor_region":
        return (inputs, [upstream[0] + upstream[1]] * 2) if not sequence_parallel else same
    if not sequence_parallel:
        return same
    if name == "gather_sequence":
        return [WHOLE, WHOLE], list((upstream[0] + upstream[1]).chunk(2))
    if name == "local_sequence":
        zero = torch.zeros_like(upstream[0])
        return list(WHOLE.chunk(2)), [
            torch.cat((upstream[0], zero)),
            torch.cat((zero, upstream[1])),
        ]
    return inputs, [g / 2 for g in upstream]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_at_two_ranks(name, sequence_parallel):
    found, upstream, gradients = zip(*run_ranks(_run, 2, name, sequence_parallel), strict=True)
    values, expected = _expected(name, sequence_parallel, list(upstream))
    for rank in (0, 1):
        torch.testing.assert_close(found[rank], values[rank])
        torch.testing.assert_close(gradients[rank], expected[rank])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_process_has_nothing_to_exchange(name):
    x = WHOLE.clone().requires_grad_()
    y = FUNCTIONS[name](x, ctx=ParallelContext.single())
    assert torch.equal(y, x)
    upstream = _values(0, x.shape)
    assert torch.equal(torch.autograd.grad(y, x, upstream)[0], upstream)


def _strided() -> list[torch.Tensor]:
    """Values and gradients of what gets a tensor that is not contiguous."""
    ctx = ParallelContext.from_world(tensor=2, sequence_parallel=True)
    x = _values(ctx.tensor.rank, torch.Size((2, 3, 4))).transpose(0, 2).requires_grad_()
    results = []
    for y in (gather_sequence(x, ctx=ctx), sum_over_tensor_ranks(x, ctx=ctx)):
        results += [y.detach(), torch.autograd.grad(y.square().sum(), x)[0].contiguous()]
    whole = ParallelContext.from_world(tensor=2)
    (expanded,) = torch.autograd.grad(copy_to_tensor_region(x, ctx=whole).sum(), x)
    return [*results, expanded]


def test_tensors_that_are_not_contiguous_are_exchanged_as_they_are():
    parts = [_values(r, torch.Size((2, 3, 4))).transpose(0, 2) for r in (0, 1)]
    for rank, found in enumerate(run_ranks(_strided, 2)):
        torch.testing.assert_close(found[0], torch.cat(parts))
        torch.testing.assert_close(found[1], 2 * 2 * parts[rank])  # both ranks use all of it
        torch.testing.assert_close(found[2], parts[0] + parts[1])
        torch.testing.assert_close(found[3], 2 * (parts[0] + parts[1]))
        assert (found[4] == 2).all()


def _shared_gradient() -> torch.Tensor:
    ctx = ParallelContext.from_world(tensor=2)
    x, other = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    total = copy_to_tensor_region(x, ctx=ctx) + other * 1.0  # both get the same gradient tensor
    return torch.autograd.grad(total, other, torch.full((3,), ctx.tensor.rank + 1.0))[0]


def test_a_gradient_that_another_operation_has_too_is_not_changed():
    for rank, gradient in enumerate(run_ranks(_shared_gradient, 2)):
        assert (gradient == rank + 1).all()


def _maximum() -> torch.Tensor:
    ctx = ParallelContext.from_world(tensor=2)
    return all_reduced(
        _values(ctx.tensor.rank, WHOLE.shape), torch.distributed.ReduceOp.MAX, ctx=ctx
    )


def test_all_reduced_takes_any_operation():
    expected = torch.maximum(_values(0, WHOLE.shape), _values(1, WHOLE.shape))
    for found in run_ranks(_maximum, 2):
        assert torch.equal(found, expected)
