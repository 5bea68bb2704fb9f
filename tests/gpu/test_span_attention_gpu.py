"""FlexAttention of packed rows on a CUDA device; the oracle is a softmax over every pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.common.attention import packed_attention, windowed_attention
from tests.gpu.device import DEVICE
from tests.tolerance import rounding

LENGTHS = (300, 1, 399)  # together no multiple of a tile


def _expected(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int) -> Tensor:
    num_sinks, index = k.shape[2] - q.shape[2], torch.arange(q.shape[2], device=DEVICE)
    token = torch.arange(k.shape[2], device=DEVICE) - num_sinks
    first = (index - positions.clamp(max=window - 1)).unsqueeze(-1)
    seen = (token < 0) | ((token >= first) & (token <= index.unsqueeze(-1)))
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~seen.unsqueeze(1), float("-inf")).softmax(dim=-1) @ v


@pytest.mark.skipif(DEVICE.type != "cuda", reason="torch has no backward of it on a CPU")
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize(("window", "num_sinks"), [(700, 0), (700, 64), (100, 0)])
def test_packed_rows_equal_the_equation_in_every_gradient(window, num_sinks, head_dim):
    generator = torch.Generator(DEVICE).manual_seed(0)
    positions = torch.cat([torch.arange(n, device=DEVICE) for n in LENGTHS]).int().expand(2, -1)
    sizes = ((4, 700), (2, num_sinks + 700), (2, num_sinks + 700))
    inputs = [
        torch.randn(2, *size, head_dim, device=DEVICE, generator=generator).bfloat16()
        for size in sizes
    ]
    inputs = [x.requires_grad_() for x in inputs]
    if window < 700:
        found = windowed_attention(*inputs, window=window, positions=positions)
    else:
        found = packed_attention(*inputs, positions, num_sinks=num_sinks)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = _expected(*exact, positions, window)
    weights = torch.randn(found.shape, device=DEVICE, generator=generator).bfloat16()
    pairs = [
        (found, expected),
        *zip(
            torch.autograd.grad((found * weights).sum(), inputs),
            torch.autograd.grad((expected * weights.double()).sum(), exact),
            strict=True,
        ),
    ]
    for own, other in pairs:
        error = (own.double() - other).abs().max() / other.abs().max()
        assert error < rounding(torch.bfloat16, depth=3, length=2)
