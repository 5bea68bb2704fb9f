from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from data_tools.tokenization.tokenizers import load_tokenizer
from models import convert, generate
from models.base import TokenInputs
from models.checkpoint import load_model, open_checkpoint
from tests.forked_command import run_forked
from tests.models.checkpoints import config, edit_json, write_checkpoint
from tests.models.hf.tokenizer_files import TEXT, hugging_face_file, sentencepiece_file

TOKENS = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))
SHAPES = {
    "llama": {},
    "tied": {"tie_embeddings": True},
    "qwen2": {"qkv_bias": True, "tie_embeddings": True, "rope_theta": 1e6},
    "head_dim": {"head_dim": 12},
}


def _their_logits(directory: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("shape", SHAPES)
def test_a_checkpoint_of_four_ranks_gives_the_same_logits_in_transformers(shape, tmp_path):
    of = config(**SHAPES[shape])
    whole = write_checkpoint(tmp_path / "step_5", of, pipeline=2, tensor=2, tokenizer=None)
    convert.to_hf(tmp_path / "step_5", tmp_path / "hf")
    expected = whole(TokenInputs(TOKENS)).transpose(0, 1)
    torch.testing.assert_close(_their_logits(tmp_path / "hf"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_of_transformers_gives_the_same_logits_here(shape, tmp_path):
    write_checkpoint(tmp_path / "step_5", config(**SHAPES[shape]), tokenizer=None)
    convert.to_hf(tmp_path / "step_5", tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "changed", max_shard_size="20KB")
    convert.from_hf(tmp_path / "changed", tmp_path / "back")
    ours = load_model(open_checkpoint(tmp_path / "back"), device="cpu")
    logits = ours(TokenInputs(TOKENS)).transpose(0, 1)
    torch.testing.assert_close(logits, theirs(TOKENS).logits, rtol=1e-4, atol=5e-5)


def test_export_and_import_give_back_every_bit(tmp_path):
    of = config()
    whole = write_checkpoint(tmp_path / "step_5", of, pipeline=2, tensor=2, tokenizer=None)
    convert.to_hf(tmp_path / "step_5", tmp_path / "hf", max_shard_size="30KB")
    convert.from_hf(tmp_path / "hf", tmp_path / "back")
    stored = open_checkpoint(tmp_path / "back")
    assert stored.config == of
    loaded = dict(load_model(stored, device="cpu").named_parameters())
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, loaded[name]), name


def test_a_large_model_is_split_into_files_below_the_limit(tmp_path):
    write_checkpoint(tmp_path / "step_5", config(), tokenizer=None)
    convert.to_hf(tmp_path / "step_5", tmp_path / "hf", max_shard_size="40KB")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    for file in files:
        tensors = load_file(tmp_path / "hf" / file)
        assert sum(t.nbytes for t in tensors.values()) <= 40_000
        assert {name for name, place in index["weight_map"].items() if place == file} == set(
            tensors
        )


def test_the_precision_can_be_chosen(tmp_path):
    write_checkpoint(tmp_path / "step_5", config(), tokenizer=None)
    convert.to_hf(tmp_path / "step_5", tmp_path / "hf", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert loaded.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "settings",
    [
        {"add_dummy_prefix": True},
        # As python -m data_tools.train_tokenizer trains them.
        {
            "add_dummy_prefix": False,
            "user_defined_symbols": ["\n"],
            "allow_whitespace_only_pieces": True,
            "split_digits": True,
            "bos_id": -1,
            "eos_id": 1,
        },
    ],
)
def test_a_sentencepiece_tokenizer_is_exported_as_the_same_fast_tokenizer(settings, tmp_path):
    source = sentencepiece_file(tmp_path / "t.model", **settings)
    write_checkpoint(tmp_path / "step_5", config(), tokenizer=str(source))
    convert.to_hf(tmp_path / "step_5", tmp_path / "hf")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    original = load_tokenizer(str(source))
    assert exported.eos_token_id == original.eod_id
    for text in (TEXT, "  two  spaces ", "\u65e5\u672c \U0001f600", ""):
        ids = exported.encode(text, add_special_tokens=False)
        assert ids == original.encode(text)
        assert exported.decode(ids) == original.decode(ids)
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert settings.eos_token_id == original.eod_id


def test_a_hugging_face_tokenizer_is_exported_as_it_is(tmp_path):
    source = hugging_face_file(tmp_path / "tokenizer.json")
    write_checkpoint(tmp_path / "step_5", config(), tokenizer=str(source))
    convert.to_hf(tmp_path / "step_5", tmp_path / "hf")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert exported.encode(TEXT) == load_tokenizer(str(source)).encode(TEXT)
    assert exported.eos_token == "<|endoftext|>"
    # And back again, beside the weights.
    convert.from_hf(tmp_path / "hf", tmp_path / "back")
    spec = open_checkpoint(tmp_path / "back").tokenizer
    assert load_tokenizer(spec).encode(TEXT) == exported.encode(TEXT)


def test_a_tokenizer_that_would_change_is_refused(tmp_path, capsys):
    source = sentencepiece_file(tmp_path / "t.model", normalization_rule_name="nmt_nfkc")
    write_checkpoint(tmp_path / "step_5", config(), tokenizer=str(source))
    common = ["to-hf", "--checkpoint", str(tmp_path / "step_5"), "--output", str(tmp_path / "hf")]
    assert convert.main(common) == 2
    assert "pass --no-tokenizer" in _error(capsys)
    assert not (tmp_path / "hf").exists()
    assert convert.main([*common, "--no-tokenizer"]) == 0
    assert not list((tmp_path / "hf").glob("tokenizer*"))


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on standard error."""
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


def test_a_directory_that_holds_anything_is_left_alone(tmp_path, capsys):
    write_checkpoint(tmp_path / "step_5", config(), tokenizer=None)
    output = tmp_path / "hf"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    arguments = ["--checkpoint", str(tmp_path / "step_5"), "--output", str(output)]
    assert convert.main(["to-hf", *arguments]) == 2
    assert f"{output} exists and is not empty; choose another --output" in _error(capsys)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


def _exported(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "step_5", config(), tokenizer=None)
    convert.to_hf(tmp_path / "step_5", tmp_path / "hf", max_shard_size="40KB")
    return tmp_path / "hf"


def _refusal(model: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    output = model.parent / "back"
    assert convert.main(["from-hf", "--model", str(model), "--output", str(output)]) == 2
    assert sorted(path.name for path in model.parent.iterdir() if "back" in path.name) == []
    return _error(capsys)


def _rewrite(model: Path, change) -> None:
    """Apply `change` to the tensors and store them in one file."""
    tensors = {}
    for file in model.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (model / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, model / "model.safetensors")


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
    _rewrite(model, BAD_TENSORS[message])
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
    _rewrite(model, lambda tensors: tensors.update({name: torch.ones(4)}))
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
    _rewrite(model, lambda tensors: tensors.update({n: t.double() for n, t in tensors.items()}))
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
    ],
)
def test_a_foreign_configuration_is_refused(contents, message, tmp_path, capsys):
    model = _exported(tmp_path)
    edit_json(model / "config.json", **contents)
    assert message in _refusal(model, capsys)


def test_a_directory_that_is_no_model_is_refused(tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    assert "config.json does not exist; give a Hugging Face model" in _refusal(
        tmp_path / "hf", capsys
    )


def test_the_command_lines_work_one_after_the_other(tmp_path):
    source = sentencepiece_file(tmp_path / "t.model")
    write_checkpoint(tmp_path / "run" / "checkpoints" / "step_7", config(), tokenizer=str(source))
    begun = subprocess.run(
        [
            sys.executable,
            "-m",
            "models.convert",
            "to-hf",
            "--checkpoint=run",
            "--output=hf",
            "--dtype=bf16",
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (begun.returncode, begun.stderr) == (0, "")
    lines = [
        ["models.convert", "from-hf", "--model", "hf", "--output", "back"],
        ["models.generate", "--checkpoint", "back", "--prompt", "Some", "--max-new-tokens", "5"],
    ]
    for line in lines:
        result = run_forked(*line, cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Some")


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"tokenizer": None}, [], "names no tokenizer; give one with --tokenizer"),
        ({"tokenizer": "absent.json"}, [], "absent.json: no such file"),
        ({}, ["--temperature", "-1"], "temperature=-1.0"),
        ({}, ["--max-new-tokens", "1000"], "beyond max_position_embeddings=256"),
    ],
)
def test_generation_says_in_one_line_what_is_wrong(change, arguments, message, tmp_path, capsys):
    write_checkpoint(tmp_path / "step_5", config(), **change)
    line = ["--checkpoint", str(tmp_path / "step_5"), "--prompt", "a", *arguments]
    assert generate.main(line) == 2
    assert message in _error(capsys)
