"""Operands of attention kernels: hidden keys change nothing, unaligned rows are found."""

from __future__ import annotations

import pytest
import torch

from models.common.attention import is_aligned, masked_attention, with_hidden_keys
from tests.tolerance import FP64


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_hidden_keys_change_neither_the_result_nor_a_gradient(kv_heads):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 8, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, 2, kv_heads, 64, 8, dtype=torch.float64, generator=generator)
    mask = torch.rand(2, 1, 5, 64, generator=generator) < 0.5
    results = []
    for number in (0, 64):
        operands = [x.clone().requires_grad_() for x in (q, k, v)]
        keys, values, seen = with_hidden_keys(*operands[1:], mask, number)
        assert keys.shape[2] == values.shape[2] == seen.shape[-1] == 64 + number
        y = masked_attention(operands[0], keys, values, seen)
        y.square().sum().backward()
        results.append((y, *(x.grad for x in operands)))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, **FP64)


def test_rows_are_aligned_where_each_begins_at_16_bytes_of_its_own():
    joined = torch.zeros(10, 3, 1825)
    columns = joined[..., :1024].unflatten(-1, (8, 128)).permute(1, 2, 0, 3)
    assert not is_aligned(columns), "rows are 1,825 elements apart"
    assert is_aligned(columns.contiguous())
    wider = torch.zeros(10, 3, 1856)
    assert is_aligned(wider[..., :1024].unflatten(-1, (8, 128)).permute(1, 2, 0, 3))
    assert not is_aligned(wider[..., 1:1025].unflatten(-1, (8, 128)).permute(1, 2, 0, 3))
    slots = torch.zeros(1, 8, 65, 128)
    assert is_aligned(slots)
    assert not is_aligned(slots.expand(3, -1, -1, -1)), "rows of the batch are the same memory"
