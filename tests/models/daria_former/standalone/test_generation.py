from __future__ import annotations

import pytest
import torch

from models.daria_former import DariaFormerModel
from models.daria_former.standalone.generation import DariaGenerator
from models.generate import generate
from tests.equivalence import build
from tests.models.daria_former.shrunk import shrunk

PROMPT = torch.randint(0, 257, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> DariaFormerModel:
    model = DariaFormerModel(shrunk())
    specs, ctx = model.body.specs, model.body.ctx
    model.body = build(specs, ctx, seed=1, noise=0.2)
    return model


def test_without_variability_greedy_text_is_that_of_the_model(model):
    ours = DariaGenerator(model).generate(
        PROMPT, max_new_tokens=40, do_sample=False, use_variability=False, top_k=None, top_p=None
    )
    assert torch.equal(ours, generate(model.body.eval(), PROMPT, max_new_tokens=40))


def test_sampling_uses_the_logits_as_they_are_so_the_model_s_temperature_acts_once(model):
    """The same draws as from softmax of the full pass's logits, divided by the base temperature."""
    options = {"max_new_tokens": 12, "temperature": 0.7, "top_k": None, "top_p": None}
    generator = torch.Generator().manual_seed(5)
    drawn = DariaGenerator(model).generate(
        PROMPT, use_variability=False, generator=generator, **options
    )
    expected = generate(
        model.body.eval(), PROMPT, max_new_tokens=12, temperature=0.7,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    assert torch.equal(drawn, expected)


def test_rows_that_have_ended_are_filled(model):
    generator = DariaGenerator(model)
    free = generator.generate(PROMPT, max_new_tokens=12, do_sample=False)
    end = int(free[0, 11])
    tokens = generator.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=end)
    first = (tokens[0, 9:] == end).nonzero()[0, 0]
    assert (tokens[0, 9 + first :] == end).all()


def test_images_reach_a_generation_and_the_model_is_left_as_it_was():
    config = shrunk(image_enabled=True, image_size=32)
    model = DariaFormerModel(config)
    model.body = build(model.body.specs, model.body.ctx, seed=1, noise=0.5).train()
    texts = [
        DariaGenerator(model).generate(
            PROMPT, max_new_tokens=20, do_sample=False, images=torch.full((2, 3, 32, 32), value)
        )
        for value in (0.0, 3.0)
    ]
    assert not torch.equal(*texts)
    assert model.training


def test_greedy_text_repeats_less_with_variability():
    torch.manual_seed(0)
    model = DariaFormerModel(shrunk(variability_penalty_weight=5.0))
    generator = DariaGenerator(model)
    without = generator.generate(PROMPT, 60, do_sample=False, use_variability=False)
    with_it = generator.generate(PROMPT, 60, do_sample=False)
    measure = generator.variability.repetition
    assert measure(with_it).sum() < measure(without).sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "do_sample=False"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 1000}, "1009 .*max_seq_len=512"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"images": torch.zeros(2, 3, 32, 32)}, "image_enabled"),
    ],
)
def test_what_cannot_be_generated_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        DariaGenerator(model).generate(PROMPT, **options)


def test_a_prompt_without_tokens_is_refused(model):
    with pytest.raises(ValueError, match=r"\[1, 0\]"):
        DariaGenerator(model).generate(torch.zeros(1, 0, dtype=torch.int64))
