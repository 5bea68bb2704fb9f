"""Neither stream knows what it predicts: perturbations, bit for bit, and floors of entropy."""

from __future__ import annotations

import math

import pytest
import torch

from models.base import TokenInputs
from models.dart.model import FAMILY
from models.dart.noise import UNSCORED, draw_noise
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.models.dart.cases import VARIANTS, config_of, model_of, text_of

LENGTH = 24
KINDS = ("base", "shared trunk, twice", "gaussian", "one block", "blocks of 1")


def _changed(tokens: torch.Tensor, where: torch.Tensor | slice) -> torch.Tensor:
    others = (tokens + 1) % config_of().vocab_size
    if isinstance(where, slice):
        changed = tokens.clone()
        changed[:, where] = others[:, where]
        return changed
    return torch.where(where, others, tokens)


@torch.no_grad()
@pytest.mark.parametrize("variant", KINDS)
def test_no_causal_logit_in_training_depends_on_a_later_token(variant):
    """Over many draws of the noise, which is that of the changed text: it, too, is causal."""
    model = model_of(config_of(**VARIANTS[variant])).train()
    for salt in range(8):
        model.embedding.salt = salt
        tokens = text_of(LENGTH, batch=3, seed=salt)
        # For each place the batch once, changed from there on: all in one pass.
        places = range(1, LENGTH)
        changed = torch.cat([_changed(tokens, slice(i, None)) for i in places])
        before, after = (
            model(TokenInputs(rows)).logits.split(len(tokens), dim=1)
            for rows in (tokens.repeat(len(places), 1), changed)
        )
        for i, old, new in zip(places, before, after, strict=True):
            assert torch.equal(new[:i], old[:i]), (salt, i)
            assert not torch.equal(new[i], old[i]), (salt, i)


@torch.no_grad()
@pytest.mark.parametrize("variant", KINDS)
def test_no_draft_logit_depends_on_a_hidden_token_of_its_block_or_on_a_later_one(variant):
    config = config_of(**VARIANTS[variant])
    model, size = model_of(config).train(), config.block_size
    num_scored = num_moved = 0
    for salt in range(8):
        model.embedding.salt = salt
        tokens = text_of(LENGTH, seed=salt)
        noise = draw_noise(tokens, None, config=config, salt=salt)
        index = torch.arange(LENGTH)
        places = index if noise.positions is None else noise.positions[0]
        starts = index - places % size
        # Token j is behind place j - 1; the last place of a block hides the first of the next.
        hides = torch.cat((torch.tensor([False]), noise.hidden[0, :-1]))
        block_of = torch.cat((torch.tensor([-1]), starts[:-1]))
        blocks = starts.unique().tolist()
        unknown = [(hides & (block_of == start)) | (block_of > start) for start in blocks]
        # Two rows for each block, in one pass: what is unknown to it changed, and what is known.
        rows = [_changed(tokens, where) for each in unknown for where in (each, ~each)]
        before, changed = (
            model(TokenInputs(text)).draft_logits.unflatten(1, (len(blocks), 2))
            for text in (tokens.repeat(len(rows), 1), torch.cat(rows))
        )
        for number, start in enumerate(blocks):
            own = starts == start
            old = before[own][:, number]
            after, moved = changed[own][:, number].unbind(1)
            assert torch.equal(after, old[:, 0]), (salt, start)
            num_scored += int((noise.targets[0][own] != UNSCORED).sum())
            num_moved += int((moved != old[:, 1]).any(dim=-1).sum())
    assert num_scored > LENGTH
    assert num_moved > LENGTH


@torch.no_grad()
@pytest.mark.parametrize("variant", ["base", "gaussian"])
def test_the_exchange_goes_both_ways(variant):
    """So that the tests above say something about it: plans reach the causal stream where their
    block is hidden and nowhere else, and the causal stream reaches drafts."""
    config = config_of(**VARIANTS[variant], p_plan=0.0, p_uncond=0.0)
    tokens = text_of(LENGTH)
    levels = draw_noise(tokens, None, config=config).levels[0]
    assert (levels < config.diffusion_steps).any()
    assert (levels == config.diffusion_steps).any()
    model = model_of(config).train()
    before = model(TokenInputs(tokens))
    for name, parameter in model.named_parameters():
        if name == "pair_1.exchange.up.weight":  # of the last pair: seen by the head alone
            parameter.zero_()
    after = model(TokenInputs(tokens))
    differs = (after.logits[:, 0] != before.logits[:, 0]).any(dim=-1)
    assert torch.equal(differs, levels == config.diffusion_steps)
    assert torch.equal(after.draft_logits, before.draft_logits)
    changed = model(TokenInputs(_changed(tokens, slice(0, 1))))  # token 0 is in no block
    assert (changed.draft_logits != before.draft_logits).any(dim=-1).all()


@torch.no_grad()
def test_other_rows_change_nothing_in_training():
    model = model_of(config_of()).train()
    tokens = text_of(LENGTH, batch=4)
    together = model(TokenInputs(tokens))
    swapped = model(TokenInputs(tokens[[0, 3, 2, 1]]))
    for stream in ("logits", "draft_logits"):
        own, other = getattr(together, stream)[:, 0], getattr(swapped, stream)[:, 0]
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_the_exact_likelihood_depends_on_no_generator():
    model, tokens = model_of(config_of()).eval(), text_of(LENGTH)
    before = model(TokenInputs(tokens)).logits
    torch.manual_seed(99)
    model.embedding.salt = 3
    assert torch.equal(model(TokenInputs(tokens)).logits, before)


@pytest.mark.parametrize("kind", ["uniform", "markov"])
def test_no_loss_falls_below_the_entropy_of_the_source(kind):
    """A loss below the floor after training on fresh text would be a leak.

    The last 40 of 240 steps have 40 x 16 x 32 = 20480 tokens; 4 standard errors are allowed.
    """
    vocab, choices = 16, {"uniform": 16, "markov": 4}[kind]
    config = config_of(
        vocab_size=vocab, num_layers=2, hidden_size=32, init_std=0.05, block_size=4, p_uncond=0.01
    )
    model = SequentialModel(FAMILY.layer_specs(config), ParallelContext.single())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(3)
    successors = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(vocab)])
    values: dict[str, list[float]] = {}
    for step in range(240):
        drawn = torch.randint(0, choices, (16, 33), generator=generator)
        text = drawn.clone()
        if kind == "markov":
            for i in range(1, 33):
                text[:, i] = successors[text[:, i - 1], drawn[:, i]]
        output = model(TokenInputs(text[:, :-1]))
        total, terms = FAMILY.loss(output, text[:, 1:], config=config, ctx=model.ctx)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if step >= 200:
            for name, value in terms.items():
                values.setdefault(name, []).append(value.item())
    floor = math.log(choices)
    means = {name: torch.tensor(v).mean().item() for name, v in values.items()}
    errors = {name: torch.tensor(v).std().item() / math.sqrt(40) for name, v in values.items()}
    assert means["lm_loss"] > floor - 4 * errors["lm_loss"] - 0.01
    assert means["draft_loss"] > floor - 4 * errors["draft_loss"] - 0.01
    # The places that end a row are unscored by the diffusion loss: 1 of 32.
    assert means["diffusion_loss"] > floor * 31 / 32 - 4 * errors["diffusion_loss"] - 0.01
    if kind == "markov":
        assert means["lm_loss"] < 1.5 * floor  # and something has been learnt
