"""A DART in transformers' form, and one that begins as a Llama or Qwen2 model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)

from models import convert
from models.base import TokenInputs
from models.checkpoint import load_model, open_checkpoint
from models.dart import DARTConfig, DARTForCausalLM, DARTHFConfig
from models.dart.generation import causal
from models.dart.modes import Mode, Request, continue_rows
from models.dart.sampling import Sampling
from tests.models.dart.cases import config_of, model_of, text_of
from tests.models.hf.base_models import MODELS, save_base_model
from tests.refusals import assert_refused


@pytest.fixture(params=MODELS)
def base(request, tmp_path: Path) -> Path:
    return save_base_model(request.param, tmp_path / "base", num_layers=3)


@torch.no_grad()
def test_the_causal_stream_begins_as_the_model_that_it_is_made_from(base, tmp_path):
    line = ["from-hf", "--model", str(base), "--output", str(tmp_path / "start")]
    line += ["--family", "dart", "--trunk", "shared", "--set", "block_size=4"]
    assert convert.main(line) == 0
    stored = open_checkpoint(tmp_path / "start")
    assert (stored.config.trunk, stored.config.block_size) == ("shared", 4)
    tokens = text_of(20, batch=2)
    logits = load_model(stored, device="cpu")(TokenInputs(tokens)).logits.transpose(0, 1)
    expected = AutoModelForCausalLM.from_pretrained(base)(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_what_is_no_such_model_is_refused(base, tmp_path, capsys):
    line = [
        "from-hf",
        "--model",
        str(base),
        "--output",
        str(tmp_path / "start"),
        "--family",
        "dart",
    ]
    assert convert.main([*line, "--set", "trunk=dual", "--set", "num_layers=2"]) == 2
    assert "trunk=dual: half of the layers see noise" in capsys.readouterr().err
    assert convert.main([*line, "--set", "recursions=2"]) == 2
    assert (
        "recursions=2: a Llama or Qwen2 model applies every layer once" in capsys.readouterr().err
    )
    assert convert.main(line) == 0
    plain = ["to-hf", "--checkpoint", str(tmp_path / "start"), "--output", str(tmp_path / "plain")]
    assert convert.main([*plain, "--plain"]) == 2
    assert "reads plans of its blocks" in capsys.readouterr().err


@torch.no_grad()
def test_transformers_generates_what_mode_ar_does():
    config = config_of()
    own = model_of(config).float().eval()
    theirs = DARTForCausalLM(DARTHFConfig.from_settings(config)).eval()
    theirs.model.load_state_dict(own.state_dict())
    prompt = text_of(6)
    expected = causal(own, config, prompt, length=25, sampling=Sampling(temperature=0.0)).tokens
    rows = theirs.generate(prompt, max_new_tokens=19, do_sample=False, pad_token_id=0)
    assert torch.equal(rows, expected)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A directory with a model and its code."""
    config = config_of()
    model = DARTForCausalLM(DARTHFConfig.from_settings(config))
    model.model.load_state_dict(model_of(config).float().state_dict())
    folder: Path = tmp_path_factory.mktemp("published") / "dart"
    model.save_pretrained(folder)
    return folder


MODES: tuple[Mode, ...] = ("ar", "diffusion", "speculative")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_an_exported_model_writes_what_ours_does(mode, published):
    """By name of the directory, and as the model's own `generate` once its code is trusted."""
    config, prompt = config_of(), text_of(6, batch=2)
    own = model_of(config).float()
    request = Request(mode, 25, Sampling(0.8, 20, 0.95), eos_id=3)
    torch.manual_seed(0)
    expected = continue_rows(own, config, prompt, request).tokens
    options = {"max_length": 25, "do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95}
    options |= {"eos_token_id": 3, "pad_token_id": 3, "mode": mode}
    by_name = {"custom_generate": str(published), "trust_remote_code": True}
    plain = AutoModelForCausalLM.from_pretrained(published)
    trusted = AutoModelForCausalLM.from_pretrained(published, trust_remote_code=True)
    for model, more in ((plain, by_name), (trusted, by_name), (trusted, {})):
        torch.manual_seed(0)
        assert torch.equal(model.generate(prompt, **options, **more), expected)
        assert model.training is False


def test_plain_generate_of_a_trusted_model_is_that_of_transformers(published, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(published)
    trusted = AutoModelForCausalLM.from_pretrained(published, trust_remote_code=True)
    prompt, options = text_of(6), {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 2, "use_cache": False}, {"guidance_scale": 2.0}):
        rows = plain.generate(prompt, **options, **more)
        assert torch.equal(trusted.generate(prompt, **options, **more), rows)
    config, greedy = config_of(), Sampling(0.0)
    guided = continue_rows(
        model_of(config).float(), config, prompt, Request("ar", 15, greedy, guidance_scale=2.0)
    )
    assert torch.equal(rows, guided.tokens)
    trusted.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "custom_generate" / "generate.py").is_file()


def test_rows_that_have_ended_are_padded_as_transformers_pads_them(published):
    model = AutoModelForCausalLM.from_pretrained(published, trust_remote_code=True)
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 3.0, "top_k": 0, "max_length": 24}
    output = model.generate(
        text_of(3, batch=16), mode="diffusion", eos_token_id=[5], pad_token_id=0,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    ended = (output.sequences[:, 3:] == 5).int().cumsum(1).cumsum(1)
    assert (ended > 1).any()
    assert (output.sequences[:, 3:][ended > 1] == 0).all()
    assert model.generate(mode="speculative", bos_token_id=1, max_new_tokens=2).shape == (1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"min_length": 5}, "min_length=5"),
        ({"eos_token_id": [1, 2]}, "eos_token_id=[1, 2] with mode=diffusion"),
        ({"attention_mask": torch.tensor([[0, 1]])}, "attention_mask"),
        ({"streamer": object()}, "streamer"),
        ({"max_length": 257}, "max_position_embeddings=256"),
        ({"mode": "beam"}, "mode='beam'"),
        ({"mode": "ar", "num_diffusion_steps": 3}, "num_diffusion_steps=3 with mode=ar"),
        ({"inputs": None}, "inputs=None begins with bos_token_id"),
    ],
)
def test_what_a_mode_does_not_follow_is_refused(options, message, published):
    model = AutoModelForCausalLM.from_pretrained(published, trust_remote_code=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(
            **{"inputs": torch.zeros(1, 2, dtype=torch.long), "mode": "diffusion"} | options
        )


def test_a_packed_document_longer_than_the_model_is_refused(published):
    model = AutoModelForCausalLM.from_pretrained(published)
    places = torch.cat((torch.arange(257), torch.arange(7))).unsqueeze(0)
    with assert_refused("position", 256, "max_position_embeddings=256", "shorten"):
        model(torch.zeros_like(places), position_ids=places)


def test_the_configuration_has_the_published_names():
    config = DARTHFConfig.from_settings(DARTConfig())
    assert (config.num_hidden_layers, config.num_attention_heads) == (12, 12)
    assert config.max_seq_length == config.max_position_embeddings == 1024
    assert config.settings() == DARTConfig()
