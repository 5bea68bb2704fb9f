"""Collectives of a run over NCCL, with one rank: what it accepts, and that values come back.

On a CPU the same calls go through gloo.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from parallel.context import Axis
from parallel.token_dispatch import all_to_all
from tests.gpu.device import DEVICE

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32)


@pytest.fixture(autouse=True)
def _group(process_device):
    backend = "nccl" if process_device.type == "cuda" else "gloo"
    assert dist.get_backend() == backend
    return process_device


def _values(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(24, device=DEVICE).view(4, 6).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", [dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN])
def test_reductions(dtype, operation):
    x = _values(dtype)
    dist.all_reduce(x, op=operation)
    assert torch.equal(x, _values(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gathers_and_scatters(dtype):
    x = _values(dtype)
    gathered, scattered = torch.empty_like(x), torch.empty_like(x)
    dist.all_gather_into_tensor(gathered, x)
    dist.reduce_scatter_tensor(scattered, x)
    dist.broadcast(x, src=0)
    for found in (gathered, scattered, x):
        assert torch.equal(found, _values(dtype))


@pytest.mark.parametrize("counts", [(4,), (0,)])
def test_rows_sent_to_experts(counts):
    axis = Axis(1, 0, dist.group.WORLD)
    x = _values(torch.bfloat16)[: sum(counts)].requires_grad_()
    y = all_to_all(x, axis=axis, sent=list(counts), received=list(counts))
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_communicator_is_made_of_a_group_of_its_own():
    group = dist.new_group([0])
    x = torch.ones(3, device=DEVICE)
    dist.all_reduce(x, group=group)
    assert torch.equal(x, torch.ones(3, device=DEVICE))
