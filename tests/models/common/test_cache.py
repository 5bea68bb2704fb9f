from __future__ import annotations

import pytest
import torch

from models.common.cache import KVCache
from tests.refusals import assert_refused


def test_append_returns_everything_stored_so_far():
    cache = KVCache(8)
    keys, values = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        stored = cache.append(keys[:, :, start:stop], values[:, :, start:stop])
        assert torch.equal(stored.keys, keys[:, :, :stop])
        assert torch.equal(stored.values, values[:, :, :stop])
    assert cache.length == 7
    assert cache.num_bytes == 2 * 2 * 3 * 8 * 4 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_keys_decide_on_the_dtype(dtype):
    cache = KVCache(4)
    assert cache.num_bytes == 0
    x = torch.randn(1, 2, 1, 4, dtype=dtype)
    assert {stored.dtype for stored in cache.append(x, x)} == {dtype}


def test_rollback_forgets_what_came_after():
    cache = KVCache(8)
    first, second = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 2, 4)
    cache.append(first, first)
    cache.rollback(3)
    stored = cache.append(second, second)
    assert torch.equal(stored.keys, torch.cat((first[:, :, :3], second), dim=2))


def test_memory_is_allocated_once():
    cache = KVCache(8)
    first = cache.append(torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 4))
    second = cache.append(torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 4))
    assert first.keys.data_ptr() == second.keys.data_ptr()


def test_a_full_cache_and_a_rollback_to_the_future_are_refused():
    cache = KVCache(4)
    x = torch.zeros(2, 3, 3, 4)
    cache.append(x, x)
    with assert_refused("max_length", value=4, constraint="6 positions", remedy="max_length"):
        cache.append(x, x)
    with assert_refused("cache of length", value=3, constraint="4", remedy="from 0 to 3"):
        cache.rollback(4)
