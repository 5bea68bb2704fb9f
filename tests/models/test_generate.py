from __future__ import annotations

import pytest
import torch

from models.base import TokenInputs, logits_of
from models.generate import PREFILL_CHUNK, generate, sample
from models.llama.config import LlamaConfig
from models.llama.hf import HF
from models.llama.model import FAMILY
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.distributed import run_ranks
from tests.models.checkpoints import model
from tests.models.families import CASES, evaluated
from tests.refusals import assert_refused

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    max_position_embeddings=1024,
    init_std=0.3,
)


def _model(ctx: ParallelContext | None = None) -> SequentialModel:
    return SequentialModel(FAMILY.layer_specs(CONFIG), ctx or ParallelContext.single(), seed=3)


def _prompt(length: int = 7) -> torch.Tensor:
    return torch.randint(0, 61, (2, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("length", [1, 7, PREFILL_CHUNK + 5])
def test_greedy_generation_takes_the_best_token_of_the_full_forward_pass(length):
    model = _model()
    expected = _prompt(length)
    for _ in range(12):
        best = model(TokenInputs(expected))[-1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, best), dim=1)
    assert torch.equal(generate(model, _prompt(length), max_new_tokens=12), expected)


def test_greedy_generation_equals_that_of_transformers():
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    model = _model()
    theirs = LlamaForCausalLM(TheirConfig.from_dict(HF.to_config(CONFIG)))
    names = HF.names(CONFIG)
    theirs.load_state_dict({names[name]: p for name, p in model.named_parameters()})
    expected = theirs.generate(
        _prompt(),
        attention_mask=torch.ones_like(_prompt()),
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(generate(model, _prompt(), max_new_tokens=30), expected)


def _generate_on_two_ranks() -> torch.Tensor:
    model = _model(ParallelContext.from_world(tensor=2))
    generator = torch.Generator().manual_seed(0)
    return generate(model, _prompt(), max_new_tokens=10, temperature=0.5, generator=generator)


def test_two_tensor_ranks_generate_the_same_text_as_one():
    generator = torch.Generator().manual_seed(0)
    alone = generate(_model(), _prompt(), max_new_tokens=10, temperature=0.5, generator=generator)
    for rows in run_ranks(_generate_on_two_ranks, 2):
        assert torch.equal(rows, alone)


def test_a_row_that_has_ended_is_filled_and_the_others_go_on():
    model = _model()
    free = generate(model, _prompt(), max_new_tokens=20)
    eos_id = int(free[0, 9])  # the third new token of the first row
    rows = generate(model, _prompt(), max_new_tokens=20, eos_id=eos_id)
    for row, unlimited in zip(rows, free, strict=True):
        new = unlimited[7:].tolist()
        end = new.index(eos_id) + 1 if eos_id in new else len(new)
        assert row[7 : 7 + end].tolist() == new[:end]
        assert (row[7 + end :] == eos_id).all()


def test_generation_stops_when_every_row_has_ended():
    model = _model()
    prompt = _prompt()[:1]
    eos_id = int(generate(model, prompt, max_new_tokens=4)[0, -1])
    rows = generate(model, prompt, max_new_tokens=500, eos_id=eos_id)
    assert rows.shape[1] <= 7 + 4
    assert rows[0, -1] == eos_id


def test_the_same_generator_state_gives_the_same_text():
    def text(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        rows = generate(
            _model(), _prompt(), max_new_tokens=30, temperature=1.0, generator=generator
        )
        return rows.flatten().tolist()

    assert text(1) == text(1)
    assert text(1) != text(2)


def _frequencies(logits: torch.Tensor, **settings) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits.expand(20_000, -1), generator=generator, **settings)
    return torch.bincount(drawn, minlength=logits.numel()) / 20_000


def test_samples_follow_the_tempered_distribution():
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0])
    expected = (logits / 0.7).softmax(-1)
    torch.testing.assert_close(_frequencies(logits, temperature=0.7), expected, rtol=0.0, atol=0.02)


def test_top_k_keeps_the_k_most_probable_tokens():
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0])
    expected = torch.tensor([2.0, -torch.inf, -torch.inf, 1.0]).softmax(-1)
    frequencies = _frequencies(logits, temperature=1.0, top_k=2)
    torch.testing.assert_close(frequencies, expected, rtol=0.0, atol=0.02)
    assert (_frequencies(logits, temperature=1.0, top_k=9) > 0).all()


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, 1), (0.59, 2), (0.75, 3), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    frequencies = _frequencies(logits, temperature=1.0, top_p=top_p)
    order = torch.tensor([0, 2, 3, 1])
    assert (frequencies[order[:kept]] > 0).all()
    assert (frequencies[order[kept:]] == 0).all()


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"max_new_tokens": 0}, ("max_new_tokens", 0, "1", "raise")),
        ({"temperature": -1.0}, ("temperature", -1.0, "negative", "0")),
        ({"temperature": float("nan")}, ("temperature", "nan", "finite", "0")),
        ({"temperature": 1.0, "top_k": 0}, ("top_k", 0, "1", "leave")),
        ({"temperature": 1.0, "top_p": 0.0}, ("top_p", 0.0, ("0", "1"), "leave")),
        ({"temperature": 1.0, "top_p": 1.5}, ("top_p", 1.5, ("0", "1"), "leave")),
        ({"top_k": 5}, ("top_k", 5, "temperature=0", "temperature")),
        (
            {"max_new_tokens": 1024},
            ("position", 1024, "max_position_embeddings=1024", ("shorten", "raise")),
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, parts):
    with assert_refused(*parts):
        generate(_model(), _prompt(), **({"max_new_tokens": 1} | settings))


def test_an_empty_prompt_is_refused():
    with assert_refused("tokens", value=[2, 0], constraint="empty", remedy="prompt"):
        generate(_model(), _prompt(0), max_new_tokens=1)


# One of each family, with every kind of layer that looks at more than its own token.
FAMILIES = (
    "agiformer",
    "amrpa",
    "daria_former",
    "dart",
    "dtf",
    "llama",
    "mod",
    "mod_experts",
)
PROMPTS = torch.randint(0, 61, (4, 21), generator=torch.Generator().manual_seed(6))
LENGTHS = torch.tensor([9, 21, 4, 13])


def _evaluated(kind: str) -> SequentialModel:
    """In fp64, where products of other shapes choose the same tokens."""
    family, config = CASES[kind]
    return evaluated(model(config, family).train(), PROMPTS).double()


class _Recorded:
    """A processor that leaves the scores as they are."""

    def __init__(self) -> None:
        self.scores, self.num_logits = [], set()

    def observe(self, output) -> None:
        self.num_logits.add(len(logits_of(output)))

    def __call__(self, tokens, scores):
        self.scores.append(scores)
        return scores


@pytest.mark.parametrize("kind", FAMILIES)
def test_only_logits_of_the_last_token_are_computed_and_they_are_those_of_all(kind):
    whole, recorded = _evaluated(kind), _Recorded()
    rows = generate(whole, PROMPTS, max_new_tokens=6, processor=recorded)
    assert recorded.num_logits == {1}
    with torch.no_grad():
        expected = logits_of(whole(TokenInputs(rows[:, :-1]), whole.new_cache(4, 32)))[20:]
    torch.testing.assert_close(torch.stack(recorded.scores), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(rows[:, 21:], expected.argmax(dim=-1).T)


@pytest.mark.parametrize("kind", FAMILIES)
def test_prompts_of_different_lengths_continue_as_each_does_alone(kind):
    whole = _evaluated(kind)
    free = generate(whole, PROMPTS, max_new_tokens=12, lengths=LENGTHS)
    eos_id = int(free[0, 9 + 4])
    for options in ({}, {"eos_id": eos_id}):
        rows = generate(whole, PROMPTS, max_new_tokens=12, lengths=LENGTHS, **options)
        filler = options.get("eos_id", 0)
        for row, prompt, length in zip(rows, PROMPTS, LENGTHS.tolist(), strict=True):
            alone = generate(whole, prompt[None, :length], max_new_tokens=12, **options)[0]
            assert torch.equal(row[: len(alone)], alone)
            assert (row[len(alone) :] == filler).all()
        assert rows.shape[1] <= 21 + 12


def test_columns_beyond_every_prompt_change_nothing():
    lengths = LENGTHS.clamp(max=13)
    expected = generate(_model(), PROMPTS[:, :13], max_new_tokens=5, lengths=lengths)
    assert torch.equal(generate(_model(), PROMPTS, max_new_tokens=5, lengths=lengths), expected)
    same = torch.full((4,), 21)
    assert torch.equal(
        generate(_model(), PROMPTS, max_new_tokens=5, lengths=same),
        generate(_model(), PROMPTS, max_new_tokens=5),
    )


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        ([7], ("lengths", [1], "[2]", "each")),
        ([0, 7], ("lengths", [0, 7], ("1", "7"), "prompt")),
        ([3, 8], ("lengths", [3, 8], ("1", "7"), "prompt")),
    ],
)
def test_lengths_that_are_not_those_of_the_prompts_are_refused(lengths, parts):
    with assert_refused(*parts):
        generate(_model(), _prompt(), max_new_tokens=1, lengths=torch.tensor(lengths))
