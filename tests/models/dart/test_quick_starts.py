"""The published quick starts, as they stand but for the import path; and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from models.dart import DART, DARTConfig
from tests.models.dart.cases import BASE, config_of
from tests.refusals import assert_refused


@pytest.fixture(scope="module")
def published() -> DART:
    # Initialize configuration
    config = DARTConfig(
        vocab_size=50257,  # GPT-2 vocabulary size
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        diffusion_steps=1000,
        ar_weight=0.5,
    )

    # Initialize model
    return DART(config)


def test_quick_start(published):
    model, config = published, published.config

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


def test_the_defaults_are_the_published_ones(published):
    assert DARTConfig() == published.config
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
    other = tokens.clone()
    other[1, 12:] = (tokens[1, 12:] + 1) % 61
    assert torch.equal(model.compute_loss(other, attention_mask=mask)["ar_loss"], padded["ar_loss"])
    assert padded["ar_perplexity"] == padded["ar_loss"].exp()
    smoothed = model.compute_loss(tokens, attention_mask=mask, label_smoothing=0.1)
    assert smoothed["loss"] != padded["loss"]
    assert smoothed["ar_loss"] == padded["ar_loss"]
    outputs = model.eval()(tokens)
    assert outputs["ar_logits"].shape == outputs["diffusion_output"].shape == (2, 20, 61)
    assert (outputs["timesteps"] == BASE.diffusion_steps).all()


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"num_layers": 3}, ("num_layers", 3, "trunk=dual", ("even", "trunk=shared"))),
        ({"diffusion_steps": 1}, ("diffusion_steps", 1, "level", "2")),
        ({"exchange_rank": 33}, ("exchange_rank", 33, "hidden_size=32", "0")),
        ({"num_hidden_layers": 4}, ("num_layers", "twice", "name", "one")),
    ],
)
def test_a_wrong_setting_is_refused(settings, parts):
    with assert_refused(*parts):
        config_of(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"diffusion_steps": 0}, "greater than 0"),
        ({"block_size": 0}, "greater than 0"),
        ({"diffusion_schedule": "sigmoid"}, "'linear', 'cosine' or 'quadratic'"),
        ({"ar_weight": 1.5}, "less than or equal to 1"),
        ({"adaln": "block"}, "Extra inputs"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_of(**settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 0.5}, "guidance_scale=0.5"),
        ({"guidance_scale": 2.0, "mode": "speculative"}, "guidance_scale=2.0 with mode=spec"),
        ({"max_length": 3}, "max_length=3"),
        ({"max_length": 257}, "max_position_embeddings=256"),
        ({"max_length": 257, "mode": "diffusion"}, "max_position_embeddings=256"),
        ({"input_ids": torch.zeros(1, 300, dtype=torch.int64)}, "prompt of 300 tokens"),
        ({"mode": "beam"}, "mode='beam'"),
        ({"num_diffusion_steps": 0, "mode": "diffusion"}, "num_diffusion_steps=0"),
        ({"num_diffusion_steps": 4}, "num_diffusion_steps=4 with mode=ar"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"input_ids": None}, "input_ids=None begins with bos_token_id"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused(model, options: dict[str, Any], message):
    given = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "max_length": 9} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(**given)
