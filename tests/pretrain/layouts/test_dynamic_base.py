"""A Qwen2 model of transformers, through a real run of four ranks and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import models.dynamic.hf.auto  # noqa: F401  the exported models are known: no remote code
import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from models import convert
from models.base import TokenInputs
from models.checkpoint import load_model, open_checkpoint
from tests.distributed import run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import tiny_run, write_data
from tests.tolerance import FP64

VOCAB_SIZE = 61
TOKENS = torch.randint(0, VOCAB_SIZE, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("base") / "qwen"
    Qwen2ForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", ["mod", "dtf"])
def test_a_base_is_imported_trained_at_four_ranks_and_exported(family, qwen, tmp_path):
    begun, run_dir = tmp_path / "begun", tmp_path / "run"
    line = ["from-hf", "--model", str(qwen), "--output", str(begun), "--family", family]
    assert convert.main([*line, "--set", "capacity_gamma=0.5"]) == 0
    write_data(tmp_path / "data")
    config = tiny_run(
        tmp_path / "data",
        run_dir=str(run_dir),
        model=open_checkpoint(begun).config.model_dump(),
        training__init_from=str(begun),
        training__lr=1e-12,  # changes nothing but thresholds
        parallel__pipeline=2,
        parallel__tensor=2,
    )
    assert run_ranks(run_training, 4, config, "configs/ds/zero1.json", init=False) == [0] * 4
    for name, options in (("own", []), ("plain", ["--plain"])):
        line = ["to-hf", "--checkpoint", str(run_dir), "--output", str(tmp_path / name)]
        assert convert.main([*line, "--no-tokenizer", *options]) == 0
    with torch.no_grad():
        expected = Qwen2ForCausalLM.from_pretrained(qwen, dtype=torch.float64)(TOKENS).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float64)
        assert type(plain) is Qwen2ForCausalLM
        torch.testing.assert_close(plain(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
        own = AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype=torch.float64)
        trained = load_model(open_checkpoint(run_dir), device="cpu").double()
        logits = trained(TokenInputs(TOKENS)).logits.transpose(0, 1)
        torch.testing.assert_close(own(TOKENS).logits, logits, **FP64)
        assert (logits - expected).abs().max() > 0.01  # thresholds leave tokens out now
