"""The reverse process with gaussian noise, on sources whose exact predictions are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.base import TokenInputs
from models.dart.denoising import Block, posterior_draw, reverse
from models.dart.model import FAMILY
from models.dart.modes import Request, continue_rows
from models.dart.sampling import Sampling
from models.dart.schedule import alphas
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.models.dart.cases import config_of

VOCAB, CHANNELS = 5, 4
P = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)


def _sampling(seed: int = 0) -> Sampling:
    return Sampling(1.0, None, None, generator=torch.Generator().manual_seed(seed))


class _Exact:
    """A token for every place from the exact posterior of a source: tokens of law P, each alone or,
    as `copies`, all of a block the same."""

    def __init__(self, config, embeddings: Tensor, sampling: Sampling, *, copies: bool) -> None:
        self.alpha, self.e = alphas(config), embeddings
        self.sampling, self.copies = sampling, copies

    def __call__(self, tokens, hidden, levels, states=None):
        scores = P.log().expand(*tokens.shape, -1)
        if states is not None:
            alpha = self.alpha[levels].view(-1, 1, 1, 1)
            away = states.unsqueeze(-2) - alpha.sqrt() * self.e
            seen = -(away.square() / (2 * (1 - alpha))).sum(-1)
            if self.copies:
                seen = seen.sum(dim=1, keepdim=True).expand_as(seen)
            scores = scores + seen
        return self.sampling.draw(scores.softmax(-1))


def _reversed(num_steps: int, known: Tensor, *, copies: bool, schedule: str = "cosine") -> Tensor:
    """20000 blocks of two tokens; the known ones are 2."""
    config = config_of(
        diffusion_type="gaussian", diffusion_schedule=schedule, diffusion_steps=64, block_size=2
    )
    generator = torch.Generator().manual_seed(7)
    embeddings = torch.randn(VOCAB, CHANNELS, generator=generator, dtype=torch.float64)
    embeddings = embeddings / embeddings.square().mean(-1, keepdim=True).sqrt()
    sampling, rows = _sampling(), 20_000
    tokens = torch.full((rows, 2), 2) * known
    block = Block(tokens, known.expand(rows, -1), torch.ones(rows, 2, dtype=torch.bool))
    draw = _Exact(config, embeddings, sampling, copies=copies)
    return reverse(
        config, block, draw, lambda x: embeddings[x], num_steps=num_steps, sampling=sampling
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "quadratic"])
@pytest.mark.parametrize("num_steps", [1, 2, 9])
def test_independent_tokens_have_their_law_after_any_number_of_steps(schedule, num_steps):
    """chi^2 of 24 over pairs, p = 1e-4; so do those beside a known one."""
    none = torch.tensor([False, False])
    found = _reversed(num_steps, none, copies=False, schedule=schedule)
    counts = (VOCAB * found[:, 0] + found[:, 1]).bincount(minlength=VOCAB**2).double()
    expected = len(found) * (P.unsqueeze(1) * P).flatten()
    assert ((counts - expected).square() / expected).sum() < 61.1
    beside = _reversed(num_steps, torch.tensor([True, False]), copies=False, schedule=schedule)
    assert (beside[:, 0] == 2).all()
    counts = beside[:, 1].bincount(minlength=VOCAB).double()
    expected = len(beside) * P
    assert ((counts - expected).square() / expected).sum() < 23.6  # chi^2 of 4


def test_equal_tokens_become_equal_by_steps_and_follow_a_known_one():
    """One step draws each token alone; more of them let the tokens agree, which is conditional
    sampling where one is known."""
    none, first = torch.tensor([False, False]), torch.tensor([True, False])
    at_once, slowly = (_reversed(steps, none, copies=True) for steps in (1, 64))
    assert (at_once[:, 0] == at_once[:, 1]).double().mean().item() == pytest.approx(
        P.square().sum().item(), abs=0.02
    )
    assert (slowly[:, 0] == slowly[:, 1]).double().mean() > 0.95
    shares = slowly[:, 0].bincount(minlength=VOCAB) / len(slowly)
    assert (shares - P).abs().max() < 0.05
    assert (_reversed(64, first, copies=True) == 2).double().mean() > 0.97


def test_states_of_a_known_token_have_the_law_of_training_at_every_level():
    config = config_of(diffusion_type="gaussian", diffusion_steps=8)
    alpha, sampling = alphas(config), _sampling()
    clean = torch.tensor([1.5, -0.5]).expand(40_000, -1)
    states = None
    for level in range(8, 1, -1):
        following = alpha[level - 1].item()
        states = posterior_draw(states, clean, alpha[level].item(), following, sampling)
        mean, variance = states.mean(0), states.var(0)
        assert (mean - following**0.5 * clean[0]).abs().max() < 4 / 200
        assert (variance - (1 - following)).abs().max() < 4 * 2**0.5 / 200
    last = posterior_draw(states, clean, alpha[1].item(), 1.0, sampling)
    torch.testing.assert_close(last, clean.double())


def test_a_trained_model_continues_texts_of_one_token():
    """Rows begin with 7 and repeat one of seven others. Without a prompt the tokens of a block come
    to agree by steps; with one they are that of the prompt."""
    config = config_of(
        diffusion_type="gaussian", diffusion_steps=16, vocab_size=8, num_layers=2, block_size=4,
        ar_weight=0.0, p_plan=0.3, p_uncond=0.0, draft_weight=1.0,
    )  # fmt: skip
    model = SequentialModel(FAMILY.layer_specs(config), ParallelContext.single(), seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for step in range(200):
        # Rows with the same first token would share the noise of their first block.
        model.embedding.salt = 32 * step + torch.arange(32).unsqueeze(1)
        starts = torch.randint(0, 7, (32, 1), generator=generator)
        rows = torch.cat((torch.full((32, 1), 7), starts.expand(-1, 16)), dim=1)
        output = model(TokenInputs(rows[:, :-1].contiguous()))
        total, _ = FAMILY.loss(output, rows[:, 1:], config=config, ctx=model.ctx)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    def written(prompt: list[int], num_steps: int) -> Tensor:
        request = Request("diffusion", 14, _sampling(), num_steps=num_steps)
        rows = torch.tensor([prompt]).expand(64, -1)
        return continue_rows(model, config, rows, request).tokens

    at_once, slowly = written([7], 1), written([7], 16)
    agree = [(x[:, 2:5] == x[:, 1:4]).double().mean() for x in (at_once, slowly)]
    assert agree[0] < 0.4
    assert agree[1] > 0.8
    assert len(slowly[:, 1].unique()) == 7
    prompted = written([7, 3, 3], 16)
    assert (prompted[:, :3] == torch.tensor([7, 3, 3])).all()
    assert (prompted[:, 3:] == 3).double().mean() > 0.5
