"""The exported models: in a process with transformers alone, and in this one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from models import convert
from models.base import TokenInputs
from models.checkpoint import load_model, open_checkpoint
from models.generate import generate
from parallel.carry import SequentialModel
from tests.models.dynamic.hf.exports import CLASSES, TOKENS, Exported, export
from tests.models.hf.alone import computed_alone
from tests.tolerance import FP64, assert_close, rounding

MASK = torch.ones_like(TOKENS)
GREEDY = {"do_sample": False, "pad_token_id": 0}
NEW = 30


@torch.no_grad()
def test_a_process_with_transformers_alone_computes_the_same(exported, tmp_path):
    result = computed_alone(exported.hf, TOKENS, new_tokens=NEW, folder=tmp_path)
    model = exported.double
    output = model(TokenInputs(TOKENS))
    torch.testing.assert_close(result["logits"], output.logits.transpose(0, 1), **FP64)
    torch.testing.assert_close(result["again"], result["logits"], **FP64)
    assert torch.equal(result["greedy"], generate(model, TOKENS, max_new_tokens=NEW))
    following = F.pad(TOKENS[:, 1:], (0, 1), value=-100)
    total = exported.family.loss(output, following, config=exported.config, ctx=model.ctx).total
    torch.testing.assert_close(result["loss"], total, **FP64)
    name = exported.family.name
    names = {path.name for path in (tmp_path / "out.saved").iterdir()}
    assert {f"modeling_{name}.py", f"configuration_{name}.py"} <= names


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
@pytest.mark.parametrize("case", ["mod_variant", "dtf_variant"])
def test_every_feature_is_exported(case, tmp_path):
    exported = export(tmp_path, case)
    model, loaded = exported.loaded(output_loading_info=True)
    assert not any(loaded.values())
    logits = exported.double(TokenInputs(TOKENS)).logits.transpose(0, 1)
    torch.testing.assert_close(model(TOKENS).logits, logits, **FP64)
    forward_cached = model.generate(TOKENS, attention_mask=MASK, max_new_tokens=NEW, **GREEDY)
    assert torch.equal(forward_cached, generate(exported.double, TOKENS, max_new_tokens=NEW))


def test_an_export_comes_back_bit_for_bit(exported, tmp_path):
    exported.loaded(dtype=torch.float32).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    for name, directory in (("from_export", exported.hf), ("from_saved", tmp_path / "saved")):
        convert.from_hf(directory, tmp_path / name)
        stored = open_checkpoint(tmp_path / name)
        assert stored.config == exported.config
        back = load_model(stored, device="cpu").state_dict()
        for key, tensor in exported.whole.state_dict().items():
            assert torch.equal(back[key], tensor), key


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


# Generation.


@torch.no_grad()
def test_rows_of_different_lengths_are_generated_as_if_alone(exported):
    model = exported.loaded()
    columns, starts = torch.arange(21).expand(2, -1), torch.tensor([[5], [2]])
    mask = (columns >= starts).long()
    options = {"max_new_tokens": NEW, **GREEDY}
    together = model.generate(TOKENS * mask, attention_mask=mask, **options)
    for row, start in enumerate((5, 2)):
        own = TOKENS[row : row + 1, start:]
        alone = model.generate(own, attention_mask=torch.ones_like(own), **options)
        assert torch.equal(together[row, start:], alone[0])


@torch.no_grad()
def test_generation_with_the_cache_equals_generation_without(exported):
    model = exported.loaded()
    options = {"attention_mask": MASK, "max_new_tokens": 15, **GREEDY}
    cached = model.generate(TOKENS, **options)
    assert torch.equal(cached, model.generate(TOKENS, use_cache=False, **options))


@torch.no_grad()
def test_drafts_that_are_refused_leave_no_trace(exported):
    model = exported.loaded()
    options = {"max_new_tokens": NEW, "attention_mask": MASK[:1], "do_sample": False}
    expected = model.generate(TOKENS[:1], **options)
    drafts = model.generate(TOKENS[:1], prompt_lookup_num_tokens=3, **options)
    assert torch.equal(drafts, expected)


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
    with pytest.raises(ValueError, match="not of this configuration"):
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
        ({"capacity_gama": 0.3}, "did you mean 'capacity_gamma'"),
        ({"capacity_gamma": 1.5}, "capacity_gamma=1.5: "),
        ({"num_attention_heads": 3}, "num_heads=3 is not a multiple of num_kv_heads"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': .* only has 'silu'"),
        ({"rope_theta": 5.0}, "rope_theta=5.0 is not that of rope_parameters"),
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
    with pytest.raises(ValueError, match="causal_router=topk chooses among all columns"):
        model(TOKENS, attention_mask=padded)
    assert torch.equal(model(TOKENS, attention_mask=MASK).logits, model(TOKENS).logits)
    with pytest.raises(ValueError, match="causal_router=topk compares a token with later ones"):
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
