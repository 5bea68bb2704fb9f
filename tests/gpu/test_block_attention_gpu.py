"""FlexAttention of DART's blocks on a CUDA device; the oracle is the form with a mask."""

from __future__ import annotations

import pytest
import torch

from models.common.cache import KeysValues
from models.dart.attention import find_blocks, masked_block_attention
from models.dart.flex import flex_block_attention
from tests.gpu.device import DEVICE

LENGTH, HEAD_DIM = 700, 64  # not a multiple of a tile


@pytest.mark.skipif(DEVICE.type != "cuda", reason="torch has no backward of it on a CPU")
@pytest.mark.parametrize("size", [4, 32])
@pytest.mark.parametrize("packed", [False, True])
def test_flex_attention_equals_the_form_with_a_mask_in_every_gradient(size, packed):
    generator = torch.Generator(DEVICE).manual_seed(0)
    both_ways = torch.rand(2, LENGTH, device=DEVICE, generator=generator) < 0.5
    lengths = (300, 1, 399) if packed else (LENGTH,)
    positions = torch.cat([torch.arange(n, device=DEVICE) for n in lengths]).int().expand(2, -1)
    blocks = find_blocks(both_ways, positions, size=size)
    q, *keys_values = (
        torch.randn(2, n, LENGTH, HEAD_DIM, device=DEVICE, generator=generator).requires_grad_()
        for n in (4, 2, 2, 2, 2)
    )
    arguments = (q, KeysValues(*keys_values[:2]), KeysValues(*keys_values[2:]), blocks)
    found, expected = flex_block_attention(*arguments), masked_block_attention(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # products in TF32
    weights = torch.randn(found.shape, device=DEVICE, generator=generator)
    inputs = [q, *keys_values]
    gradients = [torch.autograd.grad((x * weights).sum(), inputs) for x in (found, expected)]
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-2, atol=1e-2)
