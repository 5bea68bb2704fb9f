"""Peculiarities of exports of `mod` and `dtf`; tests/models/hf/test_contract.py has the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from models import convert
from models.base import TokenInputs
from models.checkpoint import load_model, open_checkpoint
from parallel.carry import SequentialModel
from tests.models.dynamic.hf.exports import CLASSES, Exported
from tests.models.hf.export_folder import TOKENS
from tests.refusals import assert_refused
from tests.tolerance import FP64, assert_close, rounding

MASK = torch.ones_like(TOKENS)
GREEDY = {"do_sample": False, "pad_token_id": 0}
NEW = 30


@torch.no_grad()
def test_the_thresholds_leave_tokens_out(exported):
    """Otherwise the other tests would show nothing about routing."""
    model = exported.loaded()
    logits = model(TOKENS).logits
    for name, buffer in model.named_buffers():
        if name.endswith("tau"):
            buffer.fill_(-torch.inf)
    assert not torch.allclose(model(TOKENS).logits, logits, atol=1e-2)


@torch.no_grad()
def test_a_loader_of_qwen2_reads_the_plain_part(exported, tmp_path):
    directory = shutil.copytree(exported.hf, tmp_path / "hf")
    contents = json.loads((directory / "config.json").read_text())
    for key in ("auto_map", "architectures", "model_type"):
        del contents[key]
    (directory / "config.json").write_text(json.dumps({**contents, "model_type": "qwen2"}))
    plain, loading = Qwen2ForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float64
    )
    assert not loading["missing_keys"]
    assert loading["unexpected_keys"]
    for key in loading["unexpected_keys"]:
        assert key.split(".")[3] in ("router", "prior", "tau"), key
    # The same weights where every token is computed are the plain stack.
    dense = exported.config.model_copy(update={"capacity_gamma": 1.0})
    model = SequentialModel(exported.family.layer_specs(dense), exported.whole.ctx, seed=None)
    tensors = exported.whole.state_dict()
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[_routed_name(name, exported)])
    expected = model.eval().double()(TokenInputs(TOKENS)).logits.transpose(0, 1)
    torch.testing.assert_close(plain(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def _routed_name(name: str, exported: Exported) -> str:
    """The name in a routed model of a parameter of the plain stack, written out by hand."""
    layer, _, path = name.partition(".")
    if not layer.startswith("layer_"):
        return name
    index = int(layer.removeprefix("layer_"))
    part = path.removeprefix("block.")
    if exported.family.name == "mod":
        return f"{layer}.dynamic.{path}" if index % 2 else name
    return f"pair_{index // 2}.{('decision', 'dynamic')[index % 2]}.block.{part}"


@torch.no_grad()
def test_a_model_of_this_process_is_saved_with_its_code_and_thresholds_that_saw_nothing(
    exported, tmp_path
):
    kind, config_kind = CLASSES[exported.family.name]
    torch.manual_seed(5)
    model = kind(config_kind.from_settings(exported.config)).eval()
    model.save_pretrained(tmp_path / "saved")
    name = exported.family.name
    for file in (f"modeling_{name}.py", f"configuration_{name}.py"):
        assert (tmp_path / "saved" / file).read_bytes() == (exported.hf / file).read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")  # known: no remote code
    assert type(again) is kind
    convert.from_hf(tmp_path / "saved", tmp_path / "back")
    back = load_model(open_checkpoint(tmp_path / "back"), device="cpu").double()
    expected = model.double()(TOKENS).logits
    torch.testing.assert_close(again.double()(TOKENS).logits, expected, **FP64)
    logits = back(TokenInputs(TOKENS)).logits.transpose(0, 1)
    torch.testing.assert_close(logits, expected, **FP64)


@torch.no_grad()
def test_in_bf16_the_thresholds_stay_in_fp32(exported, tmp_path):
    model = exported.loaded(dtype=torch.bfloat16)
    taus = {n: b for n, b in model.state_dict().items() if n.endswith("tau")}
    expected = {n: b for n, b in exported.whole.state_dict().items() if n.endswith("tau")}
    assert len(taus) == exported.config.num_routed
    for name, tau in expected.items():
        assert torch.equal(taus[f"model.{name}"], tau)
    ours = load_model(open_checkpoint(exported.folder / "step_1"), device="cpu", precision="bf16")
    logits = ours(TokenInputs(TOKENS)).logits.transpose(0, 1)
    assert model(TOKENS).logits.dtype == torch.bfloat16
    assert_close(model(TOKENS).logits, logits, rounding(torch.bfloat16, depth=1, length=1))
    convert.to_hf(exported.folder / "step_1", tmp_path / "bf16", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "bf16" / "model.safetensors")
    state = {n: t for n, t in tensors.items() if n.endswith(("tau", "tau_offset"))}
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert {t.dtype for n, t in tensors.items() if n not in state} == {torch.bfloat16}


# What cannot be done.


def _without(directory: Path, name: str) -> None:
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            del tensors[name]
            save_file(tensors, file, metadata={"format": "pt"})
    index = directory / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    del contents["weight_map"][name]
    index.write_text(json.dumps(contents))


@pytest.mark.parametrize("name", ["model.layers.1.tau", "model.layers.1.mlp.up_proj.weight"])
def test_a_tensor_that_is_missing_is_not_made_up(name, exported, tmp_path):
    directory = shutil.copytree(exported.hf, tmp_path / "hf")
    _without(directory, name)
    with pytest.raises(ValueError, match=r"tau|mlp\.up"):
        CLASSES[exported.family.name][0].from_pretrained(directory)


def test_a_tensor_that_is_not_of_the_model_is_refused(exported, tmp_path):
    directory = shutil.copytree(exported.hf, tmp_path / "hf")
    contents = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(contents | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="unexpected keys"):
        CLASSES[exported.family.name][0].from_pretrained(directory)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"capacity_gama": 0.3}, "capacity_gama=0.3 .*'capacity_gamma'"),
        ({"capacity_gamma": 1.5}, "capacity_gamma=1.5: "),
        ({"num_attention_heads": 3}, "num_heads=3 .*num_kv_heads=2"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*'silu'"),
        ({"rope_theta": 5.0}, "rope_theta=5.0 .*rope_parameters"),
    ],
)
def test_a_wrong_setting_is_refused_wherever_it_is_read(values, message, exported, tmp_path):
    directory = shutil.copytree(exported.hf, tmp_path / "hf")
    contents = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(contents | values))
    with pytest.raises(ValueError, match=message):
        CLASSES[exported.family.name][1].from_pretrained(directory)
    with pytest.raises(ValueError, match=message):
        convert.from_hf(directory, tmp_path / "back")


def test_a_rule_that_looks_ahead_generates_nothing_and_takes_no_padding(exported):
    model = exported.loaded(causal_router="topk")
    padded = MASK.index_fill(1, torch.tensor([20]), 0)
    with assert_refused(
        "causal_router", value="topk", constraint="padding", remedy=("padding", "threshold")
    ):
        model(TOKENS, attention_mask=padded)
    assert torch.equal(model(TOKENS, attention_mask=MASK).logits, model(TOKENS).logits)
    with assert_refused(
        "causal_router", value="topk", constraint="generation", remedy=("threshold", "predictor")
    ):
        model.generate(TOKENS, attention_mask=MASK, max_new_tokens=2, **GREEDY)


@torch.no_grad()
def test_config_json_of_an_export_is_that_of_qwen2_and_more(exported):
    contents = json.loads((exported.hf / "config.json").read_text())
    theirs = Qwen2Config(**{k: v for k, v in contents.items() if k not in ("auto_map",)})
    config = exported.config
    assert theirs.num_hidden_layers == config.num_layers
    assert theirs.num_key_value_heads == config.num_kv_heads
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.tie_word_embeddings == config.tie_embeddings
    assert contents["capacity_gamma"] == config.capacity_gamma
    assert contents["model_type"] == exported.family.name
