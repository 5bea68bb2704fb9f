"""Import of weights that transformers or others have written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from models import convert
from models.checkpoint import load_model, open_checkpoint
from tests.models.checkpoints import config, edit_json, write_checkpoint
from tests.models.hf.base_models import rewrite_tensors
from tests.refusals import error_line


def _exported(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "step_5", config(), tokenizer=None)
    convert.to_hf(tmp_path / "step_5", tmp_path / "hf", max_shard_size="40KB")
    return tmp_path / "hf"


def _refusal(model: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    output = model.parent / "back"
    assert convert.main(["from-hf", "--model", str(model), "--output", str(output)]) == 2
    assert sorted(path.name for path in model.parent.iterdir() if "back" in path.name) == []
    return error_line(capsys)


NORM = "model.norm.weight"
BAD_TENSORS = {
    "lacks model.norm.weight": lambda t: t.pop(NORM),
    "has unexpected model.extra": lambda t: t.update({"model.extra": torch.zeros(1)}),
    "model.norm.weight has shape [31]": lambda t: t.update({NORM: torch.zeros(31)}),
    "model.norm.weight holds values that are not finite": lambda t: t[NORM].fill_(torch.nan),
    "model.norm.weight is I8; F64, F32, BF16, F16 can": lambda t: t.update({NORM: t[NORM].char()}),
}


@pytest.mark.parametrize("message", BAD_TENSORS)
def test_a_model_with_bad_tensors_is_refused(message, tmp_path, capsys):
    model = _exported(tmp_path)
    rewrite_tensors(model, BAD_TENSORS[message])
    assert message in _refusal(model, capsys)


def _same_weights(directory: Path, expected: Path) -> None:
    found, own = (
        load_model(open_checkpoint(path), device="cpu").state_dict()
        for path in (directory, expected)
    )
    assert set(found) == set(own)
    assert [name for name in own if not torch.equal(found[name], own[name])] == []


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.2.self_attn.rotary_emb.cos_cached",
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
    ],
)
def test_frequencies_that_old_files_hold_are_ignored(name, tmp_path):
    model = _exported(tmp_path)
    rewrite_tensors(model, lambda tensors: tensors.update({name: torch.ones(4)}))
    convert.from_hf(model, tmp_path / "back")
    _same_weights(tmp_path / "back", tmp_path / "step_5")


def test_a_model_that_was_saved_without_its_head_is_read(tmp_path):
    write_checkpoint(tmp_path / "step_5", config(tie_embeddings=True), tokenizer=None)
    convert.to_hf(tmp_path / "step_5", tmp_path / "hf")
    # As transformers saves the base model alone, and loads it under a head that is tied.
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf")
    model.save_pretrained(tmp_path / "body")
    assert "embed_tokens.weight" in load_file(tmp_path / "body" / "model.safetensors")
    convert.from_hf(tmp_path / "body", tmp_path / "back")
    _same_weights(tmp_path / "back", tmp_path / "step_5")


def test_weights_of_fp64_are_rounded_when_a_dtype_is_given(tmp_path, capsys):
    model = _exported(tmp_path)
    rewrite_tensors(
        model, lambda tensors: tensors.update({n: t.double() for n, t in tensors.items()})
    )
    assert "the weights are F64, which checkpoints do not have; give --dtype" in _refusal(
        model, capsys
    )
    convert.from_hf(model, tmp_path / "back", dtype=torch.float32)
    _same_weights(tmp_path / "back", tmp_path / "step_5")


def _other_weights(model: Path) -> dict[str, torch.Tensor]:
    """Those of the files of a sharded model, all one larger."""
    tensors: dict[str, torch.Tensor] = {}
    for file in model.glob("*.safetensors"):
        tensors |= load_file(file)
    return {name: tensor + 1 for name, tensor in tensors.items()}


def _theirs(model: Path, name: str) -> torch.Tensor:
    return transformers.AutoModelForCausalLM.from_pretrained(model).state_dict()[name]


@pytest.mark.parametrize("named", [None, "new.safetensors", "new.safetensors.index.json"])
def test_of_several_weights_those_are_read_that_transformers_reads(named, tmp_path):
    model = _exported(tmp_path)
    single = "model.safetensors" if named is None else "new.safetensors"
    save_file(_other_weights(model), model / single, metadata={"format": "pt"})
    if named is not None:
        edit_json(model / "config.json", transformers_weights=named)
        placed = dict.fromkeys(load_file(model / single), single)
        (model / "new.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": placed})
        )
    remarks = convert.from_hf(model, tmp_path / "back")
    assert any("model.safetensors was read" in r for r in remarks) is (named is None)
    found = load_model(open_checkpoint(tmp_path / "back"), device="cpu").state_dict()
    assert torch.equal(found["head.norm.weight"], _theirs(model, NORM))
    own = load_model(open_checkpoint(tmp_path / "step_5"), device="cpu").state_dict()
    assert torch.equal(found["head.norm.weight"], own["head.norm.weight"] + 1)


@pytest.mark.parametrize(
    ("file", "contents", "message"),
    [
        ("config.json", {"transformers_weights": "../x.safetensors"}, "is no safetensors file of"),
        ("config.json", {"transformers_weights": ["x"]}, "transformers_weights=['x'] is no"),
        ("adapter_config.json", {}, "loads an adapter on another model; merge it"),
    ],
)
def test_weights_of_another_place_are_refused(file, contents, message, tmp_path, capsys):
    model = _exported(tmp_path)
    path = model / file
    old = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(old | contents))
    assert message in _refusal(model, capsys)


@pytest.mark.parametrize("same", [True, False])
def test_a_second_copy_of_a_tied_head_must_equal_the_embedding(same, tmp_path, capsys):
    write_checkpoint(tmp_path / "step_5", config(tie_embeddings=True), tokenizer=None)
    convert.to_hf(tmp_path / "step_5", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0.0 if same else 1.0)
    save_file(tensors, file)
    if same:
        convert.from_hf(tmp_path / "hf", tmp_path / "back")
    else:
        assert "ties lm_head.weight to model.embed_tokens.weight, but they differ" in _refusal(
            tmp_path / "hf", capsys
        )


def test_pickled_weights_are_refused_without_being_opened(tmp_path, capsys):
    model = _exported(tmp_path)
    for file in model.glob("model*"):
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert "is a pickle, which runs code when it is loaded" in _refusal(model, capsys)


def test_an_index_that_leaves_the_directory_is_refused(tmp_path, capsys):
    model = _exported(tmp_path)
    index = model / "model.safetensors.index.json"
    edit_json(index, weight_map={NORM: "../../secret.safetensors"})
    assert "outside the directory" in _refusal(model, capsys)


def test_an_index_that_is_not_true_is_refused(tmp_path, capsys):
    model = _exported(tmp_path)
    index = model / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    elsewhere = next(file for file in placed.values() if file != placed[NORM])
    edit_json(index, weight_map=placed | {NORM: elsewhere})
    assert "do not agree about model.norm.weight" in _refusal(model, capsys)
    edit_json(index, weight_map=placed | {NORM: "absent.safetensors"})
    assert "absent.safetensors is not a readable safetensors file" in _refusal(model, capsys)


def test_a_truncated_file_is_refused(tmp_path, capsys):
    model = _exported(tmp_path)
    file = sorted(model.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-7])
    assert "is not a readable safetensors file" in _refusal(model, capsys)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model_type='gpt2' cannot be imported; known are agiformer, amrpa, daria_former, dart,",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', the llama family only has 'silu'"),
        ({"hidden_size": "large"}, "config.json cannot be imported: "),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method='gptq'"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}, "rope_parameters": None},
            "factor=0.5: Input should be greater than 1; correct it",
        ),
        (  # the remedy, at the end, is never cut off
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None},
            "over whole heads; such a model cannot be imported\n",
        ),
    ],
)
def test_a_foreign_configuration_is_refused(contents, message, tmp_path, capsys):
    model = _exported(tmp_path)
    edit_json(model / "config.json", **contents)
    assert message in _refusal(model, capsys)


def test_a_directory_that_is_no_model_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").mkdir()
    for model in (tmp_path / "hf", Path("Qwen2.5-0.5B")):
        line = _refusal(model, capsys)
        assert f"--model {model}: " in line
        assert f" {model.absolute()}; " in line


GEMMA = {"activation": "gelu_tanh", "zero_centered_gamma": True, "scale_embeddings": True}
OLMO2 = {"qk_norm": "all_heads", "norm_after": True}


@pytest.mark.parametrize("settings", [{"hf_type": "phi3"}, OLMO2, GEMMA, {"hf_type": "mistral"}])
def test_a_model_comes_back_from_transformers_as_it_went(settings, tmp_path):
    write_checkpoint(tmp_path / "step_5", config(**settings), tokenizer=None)
    convert.to_hf(tmp_path / "step_5", tmp_path / "hf", max_shard_size="40KB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs.save_pretrained(tmp_path / "again")
    convert.from_hf(tmp_path / "again", tmp_path / "back")
    _same_weights(tmp_path / "back", tmp_path / "step_5")
    assert open_checkpoint(tmp_path / "back").config == config(**settings)
    convert.to_hf(tmp_path / "back", tmp_path / "hf2")
    assert json.loads((tmp_path / "hf2" / "config.json").read_text()) == json.loads(
        (tmp_path / "hf" / "config.json").read_text()
    )


QKV = "model.layers.1.self_attn.qkv_proj.weight"
BAD_ROWS = {
    f"lacks {QKV}": lambda t: t.pop(QKV),
    f"{QKV} has shape [63, 32]": lambda t: t.update({QKV: t[QKV][1:].clone()}),
    "has unexpected model.layers.0.self_attn.q_proj.weight": lambda t: t.update(
        {"model.layers.0.self_attn.q_proj.weight": torch.zeros(32, 32)}
    ),
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_a_tensor_that_does_not_hold_the_rows_of_its_parts_is_refused(message, tmp_path, capsys):
    write_checkpoint(tmp_path / "step_5", config(hf_type="phi3"), tokenizer=None)
    convert.to_hf(tmp_path / "step_5", tmp_path / "hf", max_shard_size="40KB")
    rewrite_tensors(tmp_path / "hf", BAD_ROWS[message])
    assert message in _refusal(tmp_path / "hf", capsys)
