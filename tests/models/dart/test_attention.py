"""Attention of blocks in chunks of queries, against one whole mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.base import TokenInputs
from models.common.cache import KeysValues
from models.dart.attention import block_attention, find_blocks
from models.dart.model import FAMILY
from tests.models.dart.cases import config_of, model_of, text_of
from tests.tolerance import FP64

LENGTH, SIZE = 29, 5


def _positions() -> torch.Tensor:
    """Two rows whose documents begin inside blocks of each other."""
    lengths = ([7, 1, 12, 9], [29])
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]).int()


@pytest.mark.parametrize("chunk", [1, 4, 5, 7, 512])
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_equal_a_softmax_over_every_pair(chunk, packed, monkeypatch):
    monkeypatch.setattr("models.dart.attention.QUERY_BLOCK", chunk)
    generator = torch.Generator().manual_seed(0)
    positions = _positions() if packed else None
    both_ways = torch.rand(2, LENGTH, generator=generator) < 0.5
    draw = [
        torch.randn(2, n, LENGTH, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (4, 2, 2, 2, 2)
    ]
    q, ck, cv, k, v = draw
    blocks = find_blocks(both_ways, positions, size=SIZE)
    found = block_attention(q, KeysValues(ck, cv), KeysValues(k, v), blocks)
    index = torch.arange(LENGTH)
    places = index.expand(2, -1) if positions is None else positions
    starts = index - places % SIZE
    i, j = index.unsqueeze(1), index.unsqueeze(0)
    context = (j <= starts.unsqueeze(2)) & (j >= (index - places).unsqueeze(2))
    own = starts.unsqueeze(1) == starts.unsqueeze(2)
    own = own & (both_ways.unsqueeze(2) | (j <= i))
    mask = torch.cat((context, own), dim=2).unsqueeze(1)
    keys, values = (
        torch.cat(pair, dim=2).repeat_interleave(2, dim=1) for pair in ((ck, k), (cv, v))
    )
    scores = (q @ keys.transpose(2, 3) / 8**0.5).masked_fill(~mask, -torch.inf)
    expected = scores.softmax(-1) @ values
    torch.testing.assert_close(found, expected, **FP64)
    weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((x * weights).sum(), draw) for x in (found, expected)]
    for own_gradient, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own_gradient, other, **FP64)


@pytest.mark.parametrize("p_uncond", [0.0, 0.1])
def test_a_model_in_chunks_has_the_loss_and_gradients_of_one_in_a_whole(p_uncond, monkeypatch):
    config, text = config_of(p_uncond=p_uncond), text_of(LENGTH + 1, batch=2)
    results = []
    for chunk in (512, 7):
        monkeypatch.setattr("models.dart.attention.QUERY_BLOCK", chunk)
        model = model_of(config)
        output = model(TokenInputs(text[:, :-1].contiguous()))
        total, _ = FAMILY.loss(output, text[:, 1:], config=config, ctx=model.ctx)
        results.append((total, *torch.autograd.grad(total, list(model.parameters()))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **FP64)


@torch.no_grad()
def test_the_keys_that_a_chunk_is_given_end_with_its_blocks(monkeypatch):
    """No mask is as wide as a row: a chunk sees its past, and of its own stream its blocks."""
    seen = []
    attend = F.scaled_dot_product_attention

    def recorded(q, k, v, **options):
        seen.append((q.shape[2], k.shape[2]))
        return attend(q, k, v, **options)

    monkeypatch.setattr("models.dart.attention.QUERY_BLOCK", 10)
    monkeypatch.setattr("models.dart.attention.F.scaled_dot_product_attention", recorded)
    shape = (1, 1, 30, 4)
    q, context, own = torch.randn(shape), *(KeysValues(*torch.randn(2, *shape)) for _ in range(2))
    blocks = find_blocks(torch.ones(1, 30, dtype=torch.bool), None, size=SIZE)
    block_attention(q, context, own, blocks)
    assert seen == [(10, 6 + 10), (10, 16 + 10), (10, 26 + 10)]
