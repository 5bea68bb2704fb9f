"""Penalties for what was said: the arithmetic, and their place in transformers' generation."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import LogitsProcessorList

from models.daria_former import DariaFormerForCausalLM, DariaFormerHFConfig, DariaFormerModel
from models.daria_former.standalone.logits_processor import ReactionVariabilitySystem
from tests.models.daria_former.shrunk import shrunk


def test_repetition_is_the_share_of_ngrams_that_came_before():
    system = ReactionVariabilitySystem(shrunk(variability_ngram_size=2))
    rows = torch.tensor([[1, 2, 1, 2, 1, 2], [1, 2, 3, 4, 5, 6]])
    # 12 21 12 21 12: three of five have been there; of the other row none.
    assert system.repetition(rows).tolist() == pytest.approx([3 / 5, 0.0])
    assert system.temperature(1.0, rows).flatten().tolist() == pytest.approx([1.3, 1.0])
    same = torch.ones(2, 4)
    hot = system.temperature(2.0, rows, (same, same)).flatten()
    assert hot.tolist() == pytest.approx([2 * (1 + (0.6 + 0.1) / 2), 2 * 1.05])


def test_what_was_said_and_what_templates_say_becomes_less_likely():
    config = shrunk(vocab_size=5, variability_penalty_weight=0.5)
    system = ReactionVariabilitySystem(config)
    scores = system(torch.tensor([[1, 1, 2, 3]]), torch.zeros(1, 5))
    assert scores[0].tolist() == pytest.approx([0.0, -0.25, -0.125, -0.125, 0.0])
    system.fit_anti_template(torch.tensor([6.0, 1.0, 1.0, 1.0, 1.0]))
    assert system.bias[0].item() == pytest.approx(-0.5 * torch.tensor(3.0).log().item())
    assert (system.bias[1:] == 0).all()


def test_counts_of_another_vocabulary_are_refused():
    system = ReactionVariabilitySystem(shrunk())
    with pytest.raises(ValueError, match="257"):
        system.fit_anti_template(torch.ones(3))
    with pytest.raises(ValueError, match="all 0"):
        system.fit_anti_template(torch.zeros(257))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_hashed_ngrams_are_counted_as_a_plain_counter_does(size):
    rows = torch.randint(0, 3, (5, 40), generator=torch.Generator().manual_seed(size))
    rows = rows * 100_003  # large ids, so that products wrap around
    config = shrunk(variability_ngram_size=size)
    expected = []
    for row in rows.tolist():
        ngrams = Counter(tuple(row[i : i + size]) for i in range(len(row) - size + 1))
        expected.append(sum(n - 1 for n in ngrams.values()) / ngrams.total())
    assert min(expected) > 0
    found = ReactionVariabilitySystem(config).repetition(rows)
    assert found.tolist() == pytest.approx(expected)


def test_it_is_a_logits_processor_of_transformers():
    family = shrunk(variability_penalty_weight=50.0)
    config = DariaFormerHFConfig.from_settings(family)
    model = DariaFormerForCausalLM(config).eval()
    system = ReactionVariabilitySystem(family)
    prompt = torch.randint(0, 257, (2, 9), generator=torch.Generator().manual_seed(0))
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 30,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    plain = model.generate(prompt, **options)
    varied = model.generate(prompt, logits_processor=LogitsProcessorList([system]), **options)
    expected = prompt
    with torch.no_grad():
        for _ in range(30):
            scores = system(expected, model(expected).logits[:, -1])
            expected = torch.cat((expected, scores.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(varied, expected)
    assert not torch.equal(varied, plain)


def test_a_fitted_bias_is_saved_with_the_model_and_never_trained():
    model = DariaFormerModel(shrunk())
    model.variability.fit_anti_template(torch.arange(257.0))
    assert (model.state_dict()["variability.bias"] < 0).any()
    assert not list(model.variability.parameters())
