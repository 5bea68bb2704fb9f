"""Initial values drawn by several threads are those of one."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from parallel import random
from parallel.random import initialize
from parallel.sharding import Normal, Sharding, declare


def _drawn(tensor_rank: int, *, dim: int) -> torch.Tensor:
    """This rank's half of a matrix of 200 x 300."""
    shape = [200, 300]
    shape[dim] //= 2
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty(shape))
    declare(module.weight, Sharding(dim=dim, full_size=[200, 300][dim]), Normal(0.1))
    initialize(module, seed=3, prefix="layer", tensor_rank=tensor_rank)
    return module.weight.detach()


@pytest.mark.parametrize("tensor_rank", [0, 1])
@pytest.mark.parametrize("dim", [0, 1])
def test_threads_draw_the_values_of_one(tensor_rank, dim, monkeypatch):
    expected = _drawn(tensor_rank, dim=dim)
    monkeypatch.setattr(random, "_LARGE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together, usual = threading.Barrier(2, timeout=60), random.generator_for
    first_two = iter(range(2))

    def generator_for(*arguments):
        if next(first_two, None) is not None:
            together.wait()
        return usual(*arguments)

    monkeypatch.setattr(random, "generator_for", generator_for)
    assert torch.equal(_drawn(tensor_rank, dim=dim), expected)
