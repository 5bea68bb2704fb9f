"""Emotion, noise and losses, each against its equation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from models.daria_former.emotion import scan
from models.daria_former.losses import (
    emotion_smoothness,
    emotion_variance,
    memory_consistency,
    repetition,
)
from models.daria_former.model import rhythm_regularizer
from models.daria_former.noise import dropout, normal, prefix_keys, uniform
from parallel.context import ParallelContext

CTX = ParallelContext.single()


def _doubles(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


def _rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 50])
def test_the_scan_is_the_recurrence(length):
    raw, write = _doubles((length, 2, 3), (length, 2, 3))

    def eager(raw, write):
        keep, states, state = raw.sigmoid(), [], torch.zeros(2, 3, dtype=torch.float64)
        for a, b in zip(keep, write, strict=True):
            state = a * state + b
            states.append(state)
        return torch.stack(states)

    torch.testing.assert_close(scan(raw.sigmoid(), write), eager(raw, write))
    assert gradcheck(lambda r, w: scan(r.sigmoid(), w), (raw, write))


def test_the_scan_keeps_its_precision_over_long_sequences():
    """H12."""
    keep = torch.full((32768, 1, 2), 0.999)
    write = torch.rand(32768, 1, 2, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = scan(keep.double(), write.double())
    error = (scan(keep, write).double() - exact).abs() / exact
    assert error[100:].max() < 1e-4


def test_numbers_of_keys_are_uniform_and_independent_of_each_other():
    keys = prefix_keys(torch.arange(4096).view(1, -1), None)
    assert len(keys.unique()) == 4096
    x = uniform(keys, 8, stream=1)
    assert x.min() >= 0
    assert x.max() < 1
    assert x.mean().item() == pytest.approx(0.5, abs=0.005)
    assert x.var().item() == pytest.approx(1 / 12, abs=0.002)
    streams = torch.cat([uniform(keys, 4, stream=s)[0] for s in (1, 2, 9)], dim=1)
    correlation = torch.corrcoef(streams.T) - torch.eye(12)
    assert correlation.abs().max() < 0.07  # 4.5 standard deviations
    z = normal(keys, 6, stream=3)
    assert z.shape == (1, 4096, 6)
    assert z.mean().item() == pytest.approx(0.0, abs=0.03)
    assert z.std().item() == pytest.approx(1.0, abs=0.02)
    assert z.isfinite().all()


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


def test_dropout_keeps_the_mean():
    keys = prefix_keys(torch.arange(2000).view(1, -1), None).T
    x = dropout(torch.ones(2000, 1, 16), keys, 0.3, stream=5)
    assert x.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert x.mean().item() == pytest.approx(1.0, abs=0.02)


POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]], dtype=torch.int32)


def _pairs(positions: torch.Tensor | None) -> list[tuple[int, int]]:
    return [
        (t, b) for t in range(6) for b in range(2) if positions is None or positions[b, t + 1] > 0
    ]


@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["one document", "documents"])
def test_emotion_smoothness(positions):
    e = torch.randn(7, 2, 3)
    steps = [(e[t + 1, b] - e[t, b]).square().sum() for t, b in _pairs(positions)]
    found = emotion_smoothness(e, positions, ctx=CTX)
    assert found.item() == pytest.approx(torch.stack(steps).mean().item(), rel=1e-5)
    assert emotion_smoothness(e[:1], None, ctx=CTX) == 0


@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["one document", "documents"])
def test_repetition(positions):
    # Alike enough for some neighbours to be scored.
    y = 1.0 + 0.3 * torch.randn(7, 2, 2, generator=torch.Generator().manual_seed(0))
    excess = [
        (F.cosine_similarity(y[t, b], y[t + 1, b], dim=0) - 0.9).relu()
        for t, b in _pairs(positions)
    ]
    expected = torch.stack(excess).mean().item()
    assert expected > 0
    assert repetition(y, positions, ctx=CTX).item() == pytest.approx(expected, rel=1e-4)


def test_memory_consistency():
    readout, x, layer = torch.randn(2, 3, 11, 4), torch.randn(11, 2, 6), torch.nn.Linear(12, 6)
    found = memory_consistency(readout, x, layer, segment_len=5, ctx=CTX)
    terms = []
    for c in (slice(0, 5), slice(5, 10)):
        for b in range(2):
            written = layer.weight @ readout[b, :, c].mean(dim=1).flatten()
            target = _rms(x[c, b], torch.finfo(torch.float32).eps).mean(dim=0)
            terms.append(1 - F.cosine_similarity(written, target, dim=0))
    assert found.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)
    assert memory_consistency(readout[:, :, :4], x[:4], layer, segment_len=5, ctx=CTX) == 0


def test_rhythm_and_emotion_variance():
    entropies = torch.tensor([[1.0, 1.0], [3.0, 1.0]])
    assert rhythm_regularizer(entropies, 3.0).item() == pytest.approx((2.0 + 3.0) / 2)
    assert rhythm_regularizer(entropies, 0.5).item() == pytest.approx(0.25)
    e = torch.randn(40, 2, 5)
    expected = e.flatten(0, 1).var(dim=0, correction=0).mean().item()
    assert emotion_variance(e).item() == pytest.approx(expected, rel=1e-4)
    assert not math.isnan(emotion_variance(e[:1, :1]).item())
