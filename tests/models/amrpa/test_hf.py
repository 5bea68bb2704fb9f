"""An AMRPALlama that begins as a Llama or Qwen2 model, and its losses in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)

from models import convert
from models.amrpa import FAMILY, AMRPALlamaForCausalLM, AMRPALlamaHFConfig
from models.base import TokenInputs
from models.checkpoint import load_model, open_checkpoint
from tests.models.families import CASES
from tests.models.hf.base_models import MODELS, save_base_model
from tests.tolerance import FP64

TOKENS = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=MODELS)
def base(request, tmp_path: Path) -> Path:
    return save_base_model(request.param, tmp_path / "base", num_layers=4)


@torch.no_grad()
def test_a_model_begins_as_the_function_that_it_is_made_from(base, tmp_path, capsys):
    """Bit for bit that of llama here; transformers computes norms and rotations otherwise."""
    source = ["from-hf", "--model", str(base)]
    start = ["--output", str(tmp_path / "start"), "--family", "amrpa"]
    assert convert.main([*source, *start, "--set", "target_layers=last_2"]) == 0
    assert convert.main([*source, "--output", str(tmp_path / "plain")]) == 0
    found, plain = (open_checkpoint(tmp_path / name) for name in ("start", "plain"))
    assert found.config.target_layers == "last_2"
    model = load_model(found, device="cpu")
    logits = model(TokenInputs(TOKENS)).logits
    assert torch.equal(logits, load_model(plain, device="cpu")(TokenInputs(TOKENS)))
    expected = AutoModelForCausalLM.from_pretrained(base)(TOKENS).logits
    torch.testing.assert_close(logits.transpose(0, 1), expected, rtol=1e-4, atol=1e-4)

    model.block_3.memory.heads.memory_weight.normal_()
    assert not torch.equal(model(TokenInputs(TOKENS)).logits, logits)
    line = ["to-hf", "--checkpoint", str(tmp_path / "start"), "--output", str(tmp_path / "back")]
    assert convert.main([*line, "--plain"]) == 2
    assert "corrects queries by its memory" in capsys.readouterr().err


def test_the_loss_of_transformers_is_the_loss_of_the_family_whatever_the_padding():
    """In training, with its two weighted losses, which the padding of a row does not change."""
    config = CASES["amrpa"].config.model_copy(update={"diversity_weight": 3.0, "dropout": 0.0})
    model = AMRPALlamaForCausalLM(AMRPALlamaHFConfig.from_settings(config)).double().train()
    with torch.no_grad():
        model.model.block_4.memory.heads.memory_weight.normal_()
    rows = [TOKENS[0], TOKENS[1, :13]]
    labels = torch.full((2, 20), -100)
    mask = torch.zeros(2, 20, dtype=torch.int64)
    tokens = torch.zeros(2, 20, dtype=torch.int64)
    for i, row in enumerate(rows):
        labels[i, : len(row)], tokens[i, : len(row)], mask[i, : len(row)] = row, row, 1
    found = model(tokens, attention_mask=mask, labels=labels).loss
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        following = torch.cat((row[1:], torch.tensor([-100]))).unsqueeze(0)
        output = model.model(TokenInputs(row.unsqueeze(0)))
        own = FAMILY.loss(output, following, config=config, ctx=model.model.ctx).total
        total = total + own * (len(row) - 1)
    torch.testing.assert_close(found, total / (19 + 12), **FP64)
