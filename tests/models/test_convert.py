from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from data_tools.tokenization.tokenizers import load_tokenizer
from models import convert, generate
from models.base import TokenInputs
from models.checkpoint import load_model, open_checkpoint
from parallel.checkpoint import weights
from tests.forked_command import run_forked
from tests.models.checkpoints import config, write_checkpoint
from tests.models.hf.tokenizer_files import (
    TEXT,
    TRAINED_HERE,
    hugging_face_file,
    sentencepiece_file,
)
from tests.refusals import error_line

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


@pytest.mark.parametrize("size", [None, 25_000])
def test_export_and_import_give_back_every_bit(size, tmp_path, monkeypatch):
    """From one file, or from several between layers, which are hashed side by side."""
    monkeypatch.setattr(weights, "FILE_BYTES", size or weights.FILE_BYTES)
    of = config()
    whole = write_checkpoint(tmp_path / "step_5", of, pipeline=2, tensor=2, tokenizer=None)
    convert.to_hf(tmp_path / "step_5", tmp_path / "hf", max_shard_size="30KB")
    convert.from_hf(tmp_path / "hf", tmp_path / "back")
    stored = open_checkpoint(tmp_path / "back")
    assert len(list(stored.weights.iterdir())) == (5 if size else 1)
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
    # Who may read the weights is up to the umask, as with any file.
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (*(tmp_path / "hf").iterdir(), tmp_path / "new")}
    assert len(modes) == 1
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
        TRAINED_HERE,
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
    assert "pass --no-tokenizer" in error_line(capsys)
    assert not (tmp_path / "hf").exists()
    assert convert.main([*common, "--no-tokenizer"]) == 0
    assert not list((tmp_path / "hf").glob("tokenizer*"))


def test_a_directory_that_holds_anything_is_left_alone(tmp_path, capsys):
    write_checkpoint(tmp_path / "step_5", config(), tokenizer=None)
    output = tmp_path / "hf"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    arguments = ["--checkpoint", str(tmp_path / "step_5"), "--output", str(output)]
    assert convert.main(["to-hf", *arguments]) == 2
    assert f"{output} exists and is not empty; choose another --output" in error_line(capsys)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


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
        ({}, ["--max-new-tokens", "256"], "max_position_embeddings=256; lower it to 255"),
        ({}, ["--prompt", "a" * 256], "max_position_embeddings=256; shorten --prompt"),
    ],
)
def test_generation_says_in_one_line_what_is_wrong(change, arguments, message, tmp_path, capsys):
    write_checkpoint(tmp_path / "step_5", config(), **change)
    line = ["--checkpoint", str(tmp_path / "step_5"), "--prompt", "a", *arguments]
    assert generate.main(line) == 2
    assert message in error_line(capsys)
