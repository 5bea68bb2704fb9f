"""The emotion state over long sequences, across documents and against its cell."""

from __future__ import annotations

import pytest
import torch

from models.daria_former.config import DariaFormerConfig
from models.daria_former.emotion import EmotionExpressionLayer
from parallel.context import ParallelContext
from parallel.random import initialize

H, E = 6, 4


def _site(mode: str, *, is_first: bool = False) -> EmotionExpressionLayer:
    config = DariaFormerConfig(
        hidden_dim=H, num_heads=1, num_kv_heads=1, emotion_dim=E, esv_mode=mode,
        initializer_range=0.7,
    )  # fmt: skip
    site = EmotionExpressionLayer(config, is_first=is_first, ctx=ParallelContext.single())
    initialize(site, seed=2, prefix="site", tensor_rank=0)
    return site


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
