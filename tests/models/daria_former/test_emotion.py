"""The emotion state over long sequences, across documents and against its cell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from models.common.scan import scan
from models.daria_former.emotion import EmotionExpressionLayer
from parallel.context import ParallelContext
from parallel.random import initialize
from parallel.sharding import Normal

H, E = 6, 4


def _site(mode: str, *, is_first: bool = False) -> EmotionExpressionLayer:
    site = EmotionExpressionLayer(
        H, E, mode=mode, is_first=is_first, eps=1e-6, init=Normal(0.7), ctx=ParallelContext.single()
    )
    initialize(site, seed=2, prefix="site", tensor_rank=0)
    return site


def _sequential(keep: Tensor, write: Tensor) -> Tensor:
    state, states = torch.zeros_like(write[0]), []
    for a, b in zip(keep.unbind(0), write.unbind(0), strict=True):
        state = a * state + b
        states.append(state)
    return torch.stack(states)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 50])
def test_the_scan_is_the_recurrence(length):
    generator = torch.Generator().manual_seed(length)
    raw, write = (
        torch.randn(length, 2, 3, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    )
    torch.testing.assert_close(scan(raw.sigmoid(), write), _sequential(raw.sigmoid(), write))
    assert gradcheck(lambda r, w: scan(r.sigmoid(), w), (raw, write))


def test_the_scan_keeps_its_precision_over_long_sequences():
    """H12."""
    keep = torch.full((32768, 1, 2), 0.999)
    write = torch.rand(32768, 1, 2, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = _sequential(keep.double(), write.double())
    assert ((scan(keep, write).double() - exact).abs() / exact).max() < 1e-4


@pytest.mark.parametrize("kept", [0.5, 0.999, 1.0])
def test_gradients_over_a_long_sequence_are_those_of_the_sequential_form(kept):
    """H12, in fp32 against fp64."""
    generator = torch.Generator().manual_seed(1)
    keep = torch.full((8192, 1, 2), kept)
    write = torch.rand(8192, 1, 2, generator=generator) * (1.0 - kept + 1e-4)
    upstream = torch.rand(8192, 1, 2, generator=generator)
    results = []
    for run, dtype in ((scan, torch.float32), (_sequential, torch.float64)):
        inputs = [x.to(dtype).clone().requires_grad_() for x in (keep, write)]
        states = run(*inputs)
        results.append([states, *torch.autograd.grad(states, inputs, upstream.to(dtype))])
    for found, expected in zip(*results, strict=True):
        error = (found.double() - expected).abs() / expected.abs().clamp(min=expected.abs().mean())
        assert error.max() < 1e-4


def test_inputs_of_the_scan_are_left_as_they_are():
    for length in (1, 4, 16, 17):
        keep, write = torch.rand(length, 2, 3), torch.rand(length, 2, 3)
        before = keep.clone(), write.clone()
        scan(keep, write)
        assert torch.equal(keep, before[0])
        assert torch.equal(write, before[1])


@pytest.mark.parametrize("mode", ["mingru", "gru"])
def test_the_state_stays_in_its_bounds_and_moves_there_as_the_gates_say(mode):
    site, x = _site(mode), 50 * torch.randn(40, 2, H)
    previous = torch.rand(40, 2, E) * 2 - 1
    state = site(x, previous=previous, starts=None, initial=torch.ones(2, E))
    assert (state.abs() <= 1.0).all()


@pytest.mark.parametrize("mode", ["mingru", "gru"])
def test_a_document_forgets_and_the_first_of_a_row_continues_what_is_handed_in(mode):
    site, x, previous = _site(mode), torch.randn(9, 2, H), torch.rand(9, 2, E)
    initial = torch.rand(2, E)
    starts = torch.zeros(9, 2, dtype=torch.bool)
    starts[0], starts[5] = True, True
    state = site(x, previous=previous, starts=starts, initial=initial)
    first = site(x[:5], previous=previous[:5], starts=None, initial=initial)
    second = site(x[5:], previous=previous[5:], starts=None)
    torch.testing.assert_close(state, torch.cat((first, second)))
    assert not torch.equal(first, site(x[:5], previous=previous[:5], starts=None))


def test_channels_begin_with_lifetimes_from_e_to_e5_tokens():
    """1 / sigmoid(b) tokens, so that a fresh state remembers at several scales."""
    lifetimes = 1 / _site("mingru").write_bias.sigmoid()
    expected = torch.linspace(1, 5, E).exp() + 1
    torch.testing.assert_close(lifetimes, expected)


def test_a_gradient_reaches_the_first_token_through_a_thousand():
    torch.manual_seed(0)
    x = torch.randn(1000, 1, H, requires_grad=True)
    site = _site("mingru", is_first=True)
    with torch.no_grad():
        site.write_bias.fill_(-6.0)
        site.input.mul_(0.1)
    (gradient,) = torch.autograd.grad(site(x, previous=None, starts=None)[-1].sum(), x)
    assert gradient[0].abs().max() > 1e-2 * gradient[-1].abs().max()
