"""Statistics of the hashed noise where it would be weakest: dull text, many streams."""

from __future__ import annotations

import math

import pytest
import torch

from models.common.counter_rng import STREAMS, dropout, normal, prefix_keys, uniform

# One token over and over, two by turns, and rows that differ in their first token alone.
TEXTS = {
    "one token": torch.zeros(1, 4096, dtype=torch.int64),
    "two tokens": (torch.arange(4096) % 2).view(1, -1),
    "other beginnings": torch.cat(
        (torch.arange(64).view(-1, 1), torch.zeros(64, 63, dtype=torch.int64)), dim=1
    ),
    "large ids": torch.full((1, 4096), (1 << 31) - 1),
}


@pytest.mark.parametrize("text", TEXTS)
def test_numbers_of_dull_text_are_uniform_and_unrelated(text):
    keys = prefix_keys(TEXTS[text], None)
    assert len(keys.unique()) == 4096
    streams = [STREAMS * layer + part for layer in (0, 1, 79) for part in (0, 1, 2)]
    numbers = torch.stack([uniform(keys, 8, stream=s).flatten(0, 1) for s in streams], dim=1)
    bins = torch.histc(numbers, 64, 0.0, 1.0)
    expected = numbers.numel() / 64
    chi2 = (bins - expected).square().sum() / expected
    assert abs(chi2 - 63) < 6 * math.sqrt(2 * 63)
    table = numbers.flatten(1)  # [tokens, streams * channels]
    correlation = torch.corrcoef(table.T) - torch.eye(table.shape[1])
    assert correlation.abs().max() < 5.5 / math.sqrt(4096)
    neighbours = torch.corrcoef(torch.stack((table[1:].flatten(), table[:-1].flatten())))
    assert abs(neighbours[0, 1]) < 5 / math.sqrt(table.numel())


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_moments_of_the_normal_numbers(size):
    z = normal(prefix_keys(TEXTS["two tokens"], None), size, stream=5)[0]
    assert z.shape == (4096, size)
    error = 5 / math.sqrt(z.numel())
    assert z.mean().item() == pytest.approx(0.0, abs=error)
    assert z.var().item() == pytest.approx(1.0, abs=error * math.sqrt(2))
    assert (z**3).mean().item() == pytest.approx(0.0, abs=error * math.sqrt(15))
    assert (z**4).mean().item() == pytest.approx(3.0, abs=error * math.sqrt(96))
    if size > 1:
        correlation = torch.corrcoef(z.T) - torch.eye(size)
        assert correlation.abs().max() < 5 / math.sqrt(4096)


def test_numbers_do_not_depend_on_the_row_the_batch_or_what_follows():
    tokens = torch.randint(0, 9, (3, 20), generator=torch.Generator().manual_seed(0))
    keys = prefix_keys(tokens, None)
    assert torch.equal(prefix_keys(tokens[1:2, :11], None), keys[1:2, :11])
    x = uniform(keys, 5, stream=3)
    assert torch.equal(uniform(keys[2:, 4:9], 5, stream=3), x[2:, 4:9])
    assert torch.equal(uniform(keys, 3, stream=3), x[..., :3])


def test_dropout_scales_what_it_keeps_and_its_gradient_likewise():
    keys = prefix_keys(TEXTS["one token"], None).T
    x = torch.rand(4096, 1, 4, requires_grad=True)
    y = dropout(x, keys, 0.25, stream=2)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    dropped = y == 0
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(gradient, torch.where(dropped, 0.0, 4 / 3))
    torch.testing.assert_close(y, x * gradient)
    assert dropout(x.bfloat16(), keys, 0.25, stream=2).dtype == torch.bfloat16


def test_keys_depend_on_the_document_up_to_the_token():
    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    keys = prefix_keys(tokens, None)
    changed = tokens.clone()
    changed[:, 7] += 1
    same = prefix_keys(changed, None) == keys
    assert same[:, :7].all()
    assert not same[:, 7:].any()
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], dtype=torch.int32).expand(2, -1)
    packed = prefix_keys(tokens, positions)
    assert torch.equal(packed[:, :5], prefix_keys(tokens[:, :5], None))
    assert torch.equal(packed[:, 5:], prefix_keys(tokens[:, 5:], None))
