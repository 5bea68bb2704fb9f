"""Generation: caches against whole rows, the law of speculative sampling, guidance."""

from __future__ import annotations

import pytest
import torch

from models.base import TokenInputs
from models.dart.denoising import levels_down
from models.dart.generation import Stream, causal, fill_in, speculative
from models.dart.layers import BlockInputs
from models.dart.noise import Noise
from models.dart.sampling import Sampling, accept_drafts, guided
from tests.models.dart.cases import VARIANTS, config_of, model_of, text_of
from tests.tolerance import FP64

GREEDY = Sampling(temperature=0.0)
LENGTH = 23


def _sampling(seed: int) -> Sampling:
    return Sampling(1.0, None, None, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("variant", ["base", "shared trunk, twice"])
def test_a_block_denoised_behind_the_cache_is_that_of_the_whole_row(variant, monkeypatch):
    """With tokens shown and hidden, at two levels, each row at its own, in every block."""
    config = config_of(**VARIANTS[variant])
    model, size = model_of(config).eval(), config.block_size
    text = text_of(21, batch=2)
    generator = torch.Generator().manual_seed(1)
    for own_levels in ((3, config.diffusion_steps), (config.diffusion_steps, 5)):
        row_levels = torch.tensor(own_levels)
        is_full = (row_levels == config.diffusion_steps).unsqueeze(1)
        hidden = (torch.rand(2, 20, generator=generator) < 0.5) | is_full
        for start in range(0, 20, size):
            stream = Stream(model, config, 2, 20)
            stream.advance(text[:, : start + 3])  # further than the block begins
            own = slice(start, start + size)
            block = text[:, 1:][:, own]
            before = text[:, start : start + 1]
            found = stream.denoise(start, BlockInputs(before, block, hidden[:, own], row_levels))
            levels = torch.full((2, 21), config.diffusion_steps, dtype=torch.int32)
            levels[:, own] = row_levels.int().unsqueeze(1)
            shown = torch.ones(2, 21, dtype=torch.bool)
            shown[:, own] = hidden[:, own]
            noise = Noise(levels, shown, levels, None, text)
            with monkeypatch.context() as patched:
                patched.setattr("models.dart.layers.full_noise", lambda *a, n=noise, **k: n)
                whole = model(TokenInputs(text)).draft_logits.transpose(0, 1)[:, own]
            torch.testing.assert_close(found, whole, **FP64)


@torch.no_grad()
def test_a_pass_of_generation_makes_the_logits_of_one_stream():
    config = config_of(num_layers=2, block_size=1)
    model, projected = model_of(config).eval(), []
    model.head.output.register_forward_hook(lambda *call: projected.append(call[-1].shape))
    stream = Stream(model, config, 1, 9)
    assert stream.advance(text_of(3)).shape == (3, 1, 61)
    hidden, levels = torch.ones(1, 1, dtype=torch.bool), torch.tensor([8])
    stream.denoise(2, BlockInputs(text_of(1), text_of(1), hidden, levels))
    assert projected == [(3, 1, 61), (1, 1, 61)]


@torch.no_grad()
@pytest.mark.parametrize("variant", ["base", "one block", "blocks of 1", "gaussian"])
@pytest.mark.parametrize("prompt", [1, 5, 6, 8])
def test_greedy_speculative_decoding_writes_what_greedy_decoding_writes(variant, prompt):
    config = config_of(**VARIANTS[variant])
    model, text = model_of(config).eval(), text_of(prompt)
    one_by_one = causal(model, config, text, length=LENGTH, sampling=GREEDY)
    drafted = speculative(model, config, text, length=LENGTH, sampling=GREEDY)
    assert torch.equal(one_by_one.tokens, drafted.tokens)
    assert one_by_one.num_passes == LENGTH - prompt


def test_drafts_that_are_kept_or_replaced_have_the_law_of_the_model():
    """50000 pairs of tokens, of a model p(a) p(b | a) and poor drafts q(a) q(b): chi^2 of 15."""
    generator = torch.Generator().manual_seed(0)
    rows, vocab = 50_000, 4
    first = torch.rand(vocab, generator=generator, dtype=torch.float64).softmax(-1)
    second = (3 * torch.randn(vocab, vocab, generator=generator, dtype=torch.float64)).softmax(-1)
    q = (2 * torch.randn(2, vocab, generator=generator, dtype=torch.float64)).softmax(-1)
    sampling = Sampling(1.0, None, None, generator=generator)
    proposed = q.expand(rows, -1, -1)
    drafts = sampling.draw(proposed)
    p = torch.stack((first.expand(rows, -1), second[drafts[:, 0]], second[drafts[:, 1]]), dim=1)
    count, token = accept_drafts(p, proposed, drafts, sampling)
    assert 0 < count.double().mean() < 2
    a = torch.where(count > 0, drafts[:, 0], token)
    # Where the first is replaced, the second is still to come: from the model.
    b = torch.where(count > 1, drafts[:, 1], token)
    b = torch.where(count > 0, b, sampling.draw(second[a]))
    counts = (vocab * a + b).bincount(minlength=vocab * vocab).double()
    expected = rows * (first.unsqueeze(1) * second).flatten()
    assert ((counts - expected).square() / expected).sum() < 44.3  # p = 1e-4


@torch.no_grad()
def test_speculative_sampling_of_the_model_has_the_law_of_the_model():
    """Two tokens of a vocabulary of 3, by exact probabilities: chi^2 of 8, 1000 samples."""
    config = config_of(vocab_size=3, num_layers=2, hidden_size=16, block_size=2)
    model, prompt = model_of(config).eval(), torch.tensor([[0]])
    exact = torch.zeros(3, 3, dtype=torch.float64)
    for a in range(3):
        logits = model(TokenInputs(torch.tensor([[0, a]]))).logits[:, 0].double()
        p, after = logits.softmax(-1)
        exact[a] = p[a] * after
    counts, sampling = torch.zeros(3, 3, dtype=torch.float64), _sampling(0)
    for _ in range(1000):
        row = speculative(model, config, prompt, length=3, sampling=sampling).tokens[0]
        counts[row[1], row[2]] += 1
    expected = 1000 * exact
    assert ((counts - expected).square() / expected).sum() < 31.8  # p = 1e-4
    assert expected.min() > 5


@torch.no_grad()
def test_a_short_row_sampled_in_both_modes_ends_at_the_same_token():
    config = config_of(vocab_size=3)
    model, text = model_of(config).eval(), torch.tensor([[1, 2, 0, 1]])
    for seed in range(5):
        rows = [
            mode(model, config, text, length=LENGTH, sampling=_sampling(seed), eos_id=2).tokens[0]
            for mode in (causal, speculative)
        ]
        for row in rows:  # the 2 of the prompt ends nothing
            assert len(row) > 4
            ends = (row[4:] == 2).nonzero()
            assert len(ends) <= 1
            assert len(ends) == 0 or int(ends[0]) == len(row) - 5


@torch.no_grad()
@pytest.mark.parametrize("variant", ["base", "gaussian", "one block"])
@pytest.mark.parametrize("num_steps", [1, 3, 50])
def test_filling_in_keeps_what_is_known(variant, num_steps):
    config = config_of(**VARIANTS[variant])
    model, text = model_of(config).eval(), text_of(LENGTH, batch=2)
    known = torch.ones_like(text, dtype=torch.bool)
    known[0, 7:9] = False
    known[1, 4:16] = False
    filled = fill_in(model, config, text, known, num_steps=num_steps, sampling=_sampling(0))
    assert torch.equal(filled.tokens[known], text[known])
    assert not torch.equal(filled.tokens, text)
    blocks = len(range(0, LENGTH - 1, config.block_size))
    assert filled.num_passes <= blocks * (1 + num_steps)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["masked", "gaussian"])
def test_a_row_is_filled_in_as_it_is_alone(kind):
    """Whatever the rows beside it show: one pass with the most probable tokens draws nothing."""
    config = config_of(block_size=8, diffusion_type=kind)
    model, text = model_of(config).eval(), text_of(25, batch=4)
    known = torch.rand(4, 25, generator=torch.Generator().manual_seed(0)) < 0.5
    known[:2] = torch.tensor([True, False]).unsqueeze(1)
    known[0, 3], known[:, 0] = False, True
    together = fill_in(model, config, text, known, num_steps=1, sampling=GREEDY).tokens
    for row, own, filled in zip(text.split(1), known.split(1), together, strict=True):
        alone = fill_in(model, config, row, own, num_steps=1, sampling=GREEDY).tokens
        assert torch.equal(alone[0], filled)


def test_a_row_begins_at_the_level_of_what_it_shows_and_ends_with_the_last_pass():
    config = config_of(diffusion_schedule="linear", diffusion_steps=8)
    shown = torch.tensor([0, 1, 2, 3, 4])
    levels = torch.stack(levels_down(config, shown=shown, total=4, steps=50))
    assert levels[0].tolist() == [8, 6, 4, 2, 1]
    assert (levels.diff(dim=0) <= 0).all()
    assert (levels[:-1] > 0).all()
    assert not levels[-1].any()


@torch.no_grad()
def test_filling_in_reads_the_known_tokens_after_the_hidden_ones():
    config = config_of(block_size=8, p_plan=0.0)
    model, text = model_of(config).eval(), text_of(9)
    known = torch.ones_like(text, dtype=torch.bool)
    known[0, 3] = False
    sampling = Sampling(temperature=0.0)
    filled = set()
    for last in range(40):
        text[0, 8] = last
        rows = fill_in(model, config, text, known, num_steps=1, sampling=sampling)
        filled.add(int(rows.tokens[0, 3]))
    assert len(filled) > 1


@torch.no_grad()
def test_guidance_of_1_changes_nothing_and_more_of_it_does():
    logits, other = torch.randn(2, 3, 7, dtype=torch.float64).unbind()
    torch.testing.assert_close(guided(logits, other, 1.0), logits.log_softmax(-1))
    config = config_of()
    model, text = model_of(config).eval(), text_of(9)
    options = {"length": LENGTH, "sampling": GREEDY}
    plain = causal(model, config, text, **options).tokens
    for scale in (1.5, 7.5):
        rows = causal(model, config, text, guidance_scale=scale, **options).tokens
        assert rows.shape == plain.shape
        assert not torch.equal(rows, plain)
    known = torch.arange(LENGTH).unsqueeze(0) < 9
    padded = torch.nn.functional.pad(text, (0, LENGTH - 9))
    drafts = [
        fill_in(
            model, config, padded, known, num_steps=2, sampling=_sampling(0), guidance_scale=scale
        ).tokens
        for scale in (1.0, 7.5)
    ]
    assert not torch.equal(*drafts)
