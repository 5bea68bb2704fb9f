"""A DART in transformers' form, and one that begins as a Llama or Qwen2 model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from models import convert
from models.base import TokenInputs
from models.checkpoint import load_model, open_checkpoint
from models.dart import DARTConfig, DARTForCausalLM, DARTHFConfig
from models.dart.generation import causal
from models.dart.sampling import Sampling
from tests.models.dart.cases import config_of, model_of, text_of

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


@pytest.fixture(params=["llama", "qwen2"])
def base(request, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(LlamaConfig(**SIZES))
        if request.param == "llama"
        else Qwen2ForCausalLM(Qwen2Config(**SIZES))
    )
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@torch.no_grad()
def test_the_causal_stream_begins_as_the_model_that_it_is_made_from(base, tmp_path):
    line = ["from-hf", "--model", str(base), "--output", str(tmp_path / "start")]
    line += ["--family", "dart", "--set", "trunk=shared", "--set", "block_size=4"]
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


def test_the_configuration_has_the_published_names():
    config = DARTHFConfig.from_settings(DARTConfig())
    assert (config.num_hidden_layers, config.num_attention_heads) == (12, 12)
    assert config.max_seq_length == config.max_position_embeddings == 1024
    assert config.settings() == DARTConfig()
