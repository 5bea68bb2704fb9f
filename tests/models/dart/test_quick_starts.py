"""The published quick starts, as they stand but for the import path, and with smaller numbers; and
what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from models.dart import DART, DARTConfig
from models.dart.sampling import Sampling
from tests.models.dart.cases import BASE, config_of
from tests.refusals import assert_refused
from tests.tiers import tiered
from tests.tolerance import FP64

PUBLISHED = {
    "vocab_size": 50257,  # GPT-2 vocabulary size
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "diffusion_steps": 1000,
    "ar_weight": 0.5,
}
SMALLER = {"vocab_size": 301, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES = {"published": PUBLISHED, "smaller": PUBLISHED | SMALLER}


@pytest.mark.parametrize("size", tiered(SIZES, ["smaller"]))
def test_quick_start(size):
    # Initialize configuration
    config = DARTConfig(**SIZES[size])

    # Initialize model
    model = DART(config)

    # Training example
    input_ids = torch.randint(0, config.vocab_size, (4, 128))
    loss_dict = model.compute_loss(input_ids)
    loss = loss_dict["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()

    # Generation example
    generated = model.generate(
        input_ids=torch.tensor([[0, 1, 2, 3]]),
        max_length=128,
        temperature=0.8,
        do_sample=True,
    )
    assert generated.shape == (1, 128)
    assert generated[0, :4].tolist() == [0, 1, 2, 3]

    # Classifier-Free Guidance
    generated = model.generate(
        input_ids=input_ids[:1, :8],
        guidance_scale=7.5,  # Higher values = stronger guidance
        max_length=24,
    )
    assert generated.shape == (1, 24)


def test_the_defaults_are_the_published_ones():
    assert DARTConfig() == DARTConfig(**PUBLISHED)
    config = DARTConfig()
    assert (config.num_hidden_layers, config.num_attention_heads) == (12, 12)
    assert config.max_seq_length == 1024


def test_custom_noise_scheduling():
    for schedule in ("linear", "cosine", "quadratic"):
        config = DARTConfig(
            diffusion_schedule=schedule,
            diffusion_steps=1000,
            vocab_size=61,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
        model = DART(config)
        assert model.compute_loss(torch.randint(0, 61, (2, 40)))["loss"].isfinite()


@pytest.fixture
def model() -> DART:
    return DART(config_of()).double()


@pytest.mark.parametrize("mode", ["ar", "diffusion", "speculative"])
def test_every_mode_continues_conditionally_and_unconditionally(model, mode):
    rows = torch.randint(0, 61, (2, 7))
    output = model.generate(rows, max_length=30, mode=mode, return_dict=True)
    assert output.sequences.shape == (2, 30)
    assert torch.equal(output.sequences[:, :7], rows)
    assert output.sequence_lengths.tolist() == [30, 30]
    assert output.num_passes >= 1
    assert model.generate(max_length=9, mode=mode, bos_token_id=1).shape == (1, 9)
    assert model.training


@pytest.mark.parametrize("mode", ["ar", "diffusion", "speculative"])
def test_rows_end_with_the_end_token(model, mode):
    torch.manual_seed(0)
    output = model.generate(
        torch.randint(0, 61, (8, 3)), max_length=60, mode=mode, eos_token_id=5, return_dict=True,
        top_k=None, top_p=None, temperature=3.0,
    )  # fmt: skip
    for row, length in zip(output.sequences, output.sequence_lengths.tolist(), strict=True):
        assert 5 not in row[3 : length - 1]
        assert (row[length:] == 5).all()


def test_losses_forward_and_padding(model):
    tokens = torch.randint(0, 61, (2, 20))
    mask = torch.ones_like(tokens)
    mask[1, 12:] = 0
    padded = model.compute_loss(tokens, attention_mask=mask)
    assert padded["ar_perplexity"] == padded["ar_loss"].exp()
    smoothed = model.compute_loss(tokens, attention_mask=mask, label_smoothing=0.1)
    assert smoothed["ar_loss"] == padded["ar_loss"]
    logits = model(tokens[:, :-1])["ar_logits"].transpose(1, 2)
    labels = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    own = F.cross_entropy(logits, labels, label_smoothing=0.1)
    expected = padded["loss"] + model.config.ar_weight * (own - padded["ar_loss"])
    torch.testing.assert_close(smoothed["loss"], expected, **FP64)
    nothing = model.compute_loss(tokens, attention_mask=0 * mask, label_smoothing=0.1)
    assert nothing["loss"] == 0
    outputs = model.eval()(tokens)
    assert outputs["ar_logits"].shape == outputs["diffusion_output"].shape == (2, 20, 61)
    assert (outputs["timesteps"] == BASE.diffusion_steps).all()


@pytest.mark.parametrize("changes", [{}, {"p_uncond": 0.0}, {"diffusion_type": "gaussian"}])
def test_no_loss_depends_on_padding_or_on_how_much_of_it_there_is(changes):
    """Over draws of the noise: a block that shows tokens sees the later ones, too."""
    model = DART(config_of(block_size=8, p_plan=0.2, **changes)).double()
    tokens = torch.randint(0, 61, (2, 20))
    mask = torch.ones_like(tokens)
    mask[0, 18:], mask[1, 10:] = 0, 0
    seen = 0
    for salt in range(8):
        model.body.embedding.salt = salt
        losses = model.compute_loss(tokens, attention_mask=mask)
        other = torch.where(mask == 0, (tokens + 1) % 61, tokens)
        less = model.compute_loss(tokens[:, :19], attention_mask=mask[:, :19])
        for name, value in model.compute_loss(other, attention_mask=mask).items():
            assert torch.equal(value, losses[name])
            torch.testing.assert_close(less[name], losses[name], **FP64)
        seen += bool(losses["diffusion_loss"] > 0)
    assert seen > 1


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"num_layers": 3}, ("num_layers", 3, "trunk=dual", ("even", "trunk=shared"))),
        ({"diffusion_steps": 1}, ("diffusion_steps", 1, "level", "2")),
        ({"exchange_rank": 33}, ("exchange_rank", 33, "hidden_size=32", "0")),
        ({"num_hidden_layers": 4}, ("num_hidden_layers", 4, "num_layers", "one")),
        ({"diffusion_steps": 0}, ("diffusion_steps", 0, "greater than 0", "diffusion_steps")),
        ({"block_size": 0}, ("block_size", 0, "greater than 0", "block_size")),
        ({"block_size": 2.5}, ("block_size", 2.5, "integer", "block_size")),
        (
            {"diffusion_schedule": "sigmoid"},
            ("diffusion_schedule", "'sigmoid'", ("linear", "cosine", "quadratic"), "schedule"),
        ),
        ({"ar_weight": 1.5}, ("ar_weight", 1.5, "less than or equal to 1", "ar_weight")),
        ({"adaln": "block"}, ("adaln", "'block'", "DARTConfig", "remove")),
        ({"rope_scaling": {"type": "linear"}}, ("rope_scaling.linear.factor", "", "", "set")),
    ],
)
def test_a_wrong_setting_is_refused(settings, parts):
    with assert_refused(*parts):
        config_of(**settings)


def test_a_run_file_keeps_the_places_of_its_errors():
    with pytest.raises(ValidationError) as caught:
        DARTConfig.model_validate({**BASE.model_dump(), "block_size": 0})
    assert caught.value.errors()[0]["loc"] == ("block_size",)


ROWS = torch.tensor([[0, 1, 2, 3]])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"guidance_scale": 0.5}, ("guidance_scale", 0.5, "1", "1")),
        ({"guidance_scale": float("nan")}, ("guidance_scale", "nan", "finite", "1")),
        ({"top_k": 0}, ("top_k", 0, "1", "None")),
        ({"top_p": 0.0}, ("top_p", 0.0, ("0", "1"), "None")),
        ({"top_p": 1.5}, ("top_p", 1.5, ("0", "1"), "None")),
        ({"top_p": float("nan")}, ("top_p", "nan", ("0", "1"), "None")),
        ({"repetition_penalty": 0.0}, ("repetition_penalty", 0.0, "0", "1")),
        ({"repetition_penalty": -1.0}, ("repetition_penalty", -1.0, "0", "1")),
        ({"eos_token_id": 61}, ("eos_token_id", 61, "vocab_size=61", "60")),
        ({"input_ids": None, "bos_token_id": -1}, ("bos_token_id", -1, "vocab_size=61", "60")),
        ({"input_ids": ROWS + 60}, ("input_ids", 63, "vocab_size=61", "tokenizer")),
        ({"input_ids": ROWS.float()}, ("input_ids", "float32[1, 4]", "int64", "")),
        ({"input_ids": [[0, 1]]}, ("input_ids", "list", "tensor", "torch.tensor")),
        ({"eos_token_id": [1, 2]}, ("eos_token_id", "[1, 2]", "token", "one")),
        ({"top_k": 2.5}, ("top_k", 2.5, "whole", "None")),
        ({"max_length": 9.5}, ("max_length", 9.5, ("4", "256"), "prompt")),
        ({"max_length": 4}, ("max_length", 4, ("4", "256"), "prompt")),
        ({"max_length": 257}, ("max_length", 257, ("4", "256"), "prompt")),
        ({"input_ids": ROWS.repeat(1, 64)}, ("input_ids", 256, "256", "shorten")),
    ],
)
@pytest.mark.parametrize("mode", ["ar", "diffusion", "speculative"])
def test_what_no_mode_can_do_is_refused(model, mode, options: dict[str, Any], parts):
    with assert_refused(*parts):
        model.generate(**{"input_ids": ROWS, "max_length": 9, "mode": mode} | options)


@pytest.mark.parametrize(
    ("tokens", "known", "options", "parts"),
    [
        (ROWS, ROWS < 0, {}, ("known[:, 0]", "False", "first token", "before")),
        (ROWS, [[True] * 4], {}, ("known", "list", "tensor", "torch.tensor")),
        (ROWS, (ROWS < 1).int(), {}, ("known", "int32[1, 4]", "bool[1, 4]", "known.bool()")),
        (ROWS, ROWS[:, :3] < 1, {}, ("known", "bool[1, 3]", "bool[1, 4]", "known.bool()")),
        (ROWS + 60, ROWS < 2, {}, ("input_ids", 61, "vocab_size=61", "tokenizer")),
        (
            torch.zeros(1, 257, dtype=torch.int64),
            torch.arange(257).unsqueeze(0) < 1,
            {},
            ("position", 256, "max_position_embeddings=256", "shorten"),
        ),
        (ROWS, ROWS < 1, {"guidance_scale": 0.5}, ("guidance_scale", 0.5, "1", "1")),
        (ROWS, ROWS < 1, {"sampling": Sampling(top_k=0)}, ("top_k", 0, "1", "None")),
    ],
)
def test_what_cannot_be_filled_in_is_refused(model, tokens, known, options, parts):
    with assert_refused(*parts):
        model.infill(tokens, known, **options)


def test_what_stands_at_an_unknown_place_is_not_read(model):
    known = torch.tensor([[True, False, True, False]])
    rows = []
    for other in (-100, 5, 99):
        torch.manual_seed(0)
        rows.append(model.infill(ROWS.masked_fill(~known, other), known))
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
    assert model.infill(ROWS[:, :1], known[:, :1]).tolist() == [[0]]


@pytest.mark.parametrize("call", ["forward", "compute_loss"])
def test_tokens_that_the_model_does_not_have_are_refused(model, call):
    for tokens, parts in (
        (ROWS - 1, ("input_ids", -1, "vocab_size=61", "tokenizer")),
        (ROWS[0], ("input_ids", "int64[4]", "int64[batch, tokens", "")),
    ):
        with assert_refused(*parts):
            getattr(model, call)(tokens)


def test_without_sampling_the_temperature_is_not_read(model):
    rows = [
        model.generate(ROWS, max_length=9, do_sample=False, temperature=t) for t in (0.0, 1.0, 2.0)
    ]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 2.0, "mode": "speculative"}, "guidance_scale=2.0 with mode=spec"),
        ({"mode": "beam"}, "mode='beam'"),
        ({"num_diffusion_steps": 0, "mode": "diffusion"}, "num_diffusion_steps=0"),
        ({"num_diffusion_steps": 1.5, "mode": "diffusion"}, "num_diffusion_steps=1.5"),
        ({"num_diffusion_steps": 4}, "num_diffusion_steps=4 with mode=ar"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"input_ids": None}, "input_ids=None begins with bos_token_id"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused(model, options: dict[str, Any], message):
    given = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "max_length": 9} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(**given)
