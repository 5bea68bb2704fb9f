"""The exported model, in transformers alone: this project is not on the path of those processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import convert
from models.base import TokenInputs
from models.checkpoint import load_model, open_checkpoint
from models.daria_former import DariaFormerForCausalLM, DariaFormerHFConfig
from models.daria_former.model import FAMILY
from models.generate import generate
from tests.models.checkpoints import write_checkpoint
from tests.models.families import CASES

CONFIG = CASES["daria_former"].config.model_copy(update={"vocab_size": 301})
TOKENS = torch.randint(0, 301, (2, 21), generator=torch.Generator().manual_seed(0))
_SCRIPT = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

directory, inputs, outputs = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
tokens = load_file(inputs)["tokens"]
with torch.no_grad():
    result = {"logits": model(tokens).logits.contiguous()}
    result["loss"] = model(tokens, labels=tokens).loss
    result["greedy"] = model.generate(tokens, max_new_tokens=30, do_sample=False)
model.save_pretrained(outputs + ".saved")
again = AutoModelForCausalLM.from_pretrained(outputs + ".saved", trust_remote_code=True).eval()
with torch.no_grad():
    result["again"] = again(tokens).logits.contiguous()
try:
    __import__("models")
except ImportError:
    save_file(result, outputs)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_checkpoint(folder / "step_1", CONFIG, family=FAMILY, pipeline=2, tensor=2)
    remarks = convert.to_hf(folder / "step_1", folder / "hf")
    assert any("trust_remote_code" in remark for remark in remarks)
    return folder


def _ours(folder: Path):
    return load_model(open_checkpoint(folder / "step_1"), device="cpu")


def _theirs(folder: Path) -> DariaFormerForCausalLM:
    return DariaFormerForCausalLM.from_pretrained(folder / "hf").eval()


@torch.no_grad()
def test_a_process_with_transformers_alone_computes_the_same(exported, tmp_path):
    save_file({"tokens": TOKENS}, tmp_path / "tokens")
    arguments = [exported / "hf", tmp_path / "tokens", tmp_path / "out"]
    subprocess.run(
        [sys.executable, "-I", "-c", _SITE + _SCRIPT, *map(str, arguments)],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
    )
    result, model = load_file(tmp_path / "out"), _ours(exported)
    output = model(TokenInputs(TOKENS))
    assert torch.equal(result["logits"], output.logits.transpose(0, 1))
    assert torch.equal(result["again"], result["logits"])
    shifted = FAMILY.token_losses(
        output._replace(logits=output.logits[:-1]), TOKENS[:, 1:].contiguous(), model.ctx
    )
    assert result["loss"].item() == pytest.approx(shifted.mean().item(), rel=1e-5)
    # 51 tokens: over windows, segments and the capacity of both levels of memory.
    assert torch.equal(result["greedy"], generate(model, TOKENS, max_new_tokens=30))


# The project is installed in editable form: take its finder away.
_SITE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]\n"


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(exported):
    model = _theirs(exported)
    padded = torch.cat((torch.zeros(2, 5, dtype=torch.int64), TOKENS), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    logits = model(padded, attention_mask=mask).logits[:, 5:]
    torch.testing.assert_close(logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_generation_with_the_cache_equals_generation_without(exported):
    model = _theirs(exported)
    options = {"max_new_tokens": 15, "do_sample": False}
    cached = model.generate(TOKENS, **options)
    assert torch.equal(cached, model.generate(TOKENS, use_cache=False, **options))


@torch.no_grad()
def test_a_cropped_cache_goes_on_as_if_the_tokens_had_not_been_seen(exported):
    model = _theirs(exported)
    cache = model.new_cache(2, 64)
    model(TOKENS, past_key_values=cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 18
    again = model(TOKENS[:, 18:], past_key_values=cache).logits
    torch.testing.assert_close(again, model(TOKENS).logits[:, 18:], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(exported):
    model = _theirs(exported)
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_an_export_comes_back_bit_for_bit(exported, tmp_path):
    convert.from_hf(exported / "hf", tmp_path / "back")
    back = load_model(open_checkpoint(tmp_path / "back"), device="cpu").state_dict()
    for name, tensor in _ours(exported).state_dict().items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(TOKENS, attention_mask=TOKENS.ne(TOKENS[0, -1])), "on the right|cannot leave"),
        (
            lambda m: m(
                TOKENS, attention_mask=torch.arange(21).expand(2, -1) > 2,
                past_key_values=m.new_cache(2, 30),
            ),
            "rows of one length",
        ),
        (lambda m: m.generate(TOKENS, num_beams=2, max_new_tokens=2), "num_beams=2"),
        (lambda m: m(TOKENS.repeat(1, 13)), "max_position_embeddings=256"),
        (lambda m: m(TOKENS, images=torch.zeros(2, 3, 32, 32)), "image_enabled"),
    ],
    ids=["padding on the right", "padding with a cache", "beams", "too long", "image"],
)  # fmt: skip
def test_what_the_model_cannot_do_it_says(exported, call, message):
    with pytest.raises(ValueError, match=message):
        call(_theirs(exported))


def test_an_unknown_setting_in_config_json_is_refused(exported):
    contents = json.loads((exported / "hf" / "config.json").read_text())
    contents["family_config"]["num_layerz"] = 3
    with pytest.raises(ValueError, match="num_layerz"):
        DariaFormerForCausalLM(DariaFormerHFConfig(**contents))
