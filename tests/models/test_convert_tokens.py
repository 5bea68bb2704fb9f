"""End tokens, larger vocabularies and tokenizers of two files, to Hugging Face and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import transformers
from tokenizers import ByteLevelBPETokenizer

from data_tools.tokenization.tokenizers import load_tokenizer
from models import convert, generate
from models.checkpoint import open_checkpoint
from parallel.checkpoint.manifest import TextRecord
from tests.data_tools.tokenization.tokenizer_folders import TEXT, byte_level, declare
from tests.models.checkpoints import config, write_checkpoint
from tests.refusals import error_line


def _ends(output: Path) -> int | None:
    """The end token that both files of a model name."""
    files = ("config.json", "generation_config.json")
    first, second = (json.loads((output / n).read_text()).get("eos_token_id") for n in files)
    assert first == second
    return first


def test_a_prompt_must_have_ids_of_the_model(tmp_path, capsys):
    """A tokenizer may have more: a [PAD] that no text spells does no harm."""
    byte_level(tmp_path / "t", ["</s>"])
    declare(tmp_path / "t", tokenizer_config={"eos_token": "</s>", "pad_token": "[PAD]"})
    write_checkpoint(tmp_path / "step_5", config(vocab_size=301), tokenizer=str(tmp_path / "t"))
    line = ["--checkpoint", str(tmp_path / "step_5"), "--max-new-tokens", "3", "--prompt"]
    assert generate.main([*line, "river"]) == 0
    assert capsys.readouterr().out.startswith("river")
    assert generate.main([*line, "river [PAD]"]) == 2
    assert "the prompt has id 301 ([PAD]), the model 301 ids; write it" in error_line(capsys)
    assert generate.main([*line, "river [PAD]", "--special-tokens", "plain"]) == 0
    remarks = convert.to_hf(tmp_path / "step_5", tmp_path / "hf")
    assert (
        "the tokenizer has 302 ids, the model 301: give it no text with the others, such as [PAD]"
        in remarks[0]
    )


def test_the_end_token_of_an_export_is_that_of_the_data(tmp_path, capsys):
    spec = str(byte_level(tmp_path / "t", ["<|endoftext|>", "<|doc|>"]))
    text = TextRecord(eod_id=301, bos_ids=(), special_tokens="parse")
    write_checkpoint(tmp_path / "step_5", config(vocab_size=302), tokenizer=spec, text=text)
    line = ["to-hf", "--checkpoint", str(tmp_path / "step_5"), "--output"]
    for name, options, expected in (
        ("inherited", [], 301),
        ("asked", ["--eod", "<|endoftext|>"], 300),
        ("bare", ["--no-tokenizer"], 301),
    ):
        assert convert.main([*line, str(tmp_path / name), *options]) == 0
        assert _ends(tmp_path / name) == expected
        assert (tmp_path / name / "tokenizer.json").exists() == (name != "bare")
    capsys.readouterr()
    assert convert.main([*line, str(tmp_path / "no"), "--eod", "<no>"]) == 2
    assert "<no> is not in its vocabulary" in error_line(capsys)
    assert convert.main([*line, str(tmp_path / "no"), "--eod", "<no>", "--no-tokenizer"]) == 2
    assert "--eod <no> has no effect without a tokenizer" in error_line(capsys)
    assert not (tmp_path / "no").exists()


def test_a_tokenizer_without_an_end_token_is_exported_without_one(tmp_path):
    spec = str(byte_level(tmp_path / "t"))
    write_checkpoint(tmp_path / "step_5", config(), tokenizer=spec)
    remarks = convert.to_hf(tmp_path / "step_5", tmp_path / "hf")
    assert "names no end token, so generation will not end by itself" in remarks[0]
    assert _ends(tmp_path / "hf") is None
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert exported.eos_token is None


def test_vocabulary_and_merges_are_exported_as_a_tokenizer_json(tmp_path):
    tokenizer = ByteLevelBPETokenizer()
    end = "<|endoftext|>"
    tokenizer.train_from_iterator([TEXT], 290, special_tokens=[end], show_progress=False)
    (tmp_path / "t").mkdir()
    tokenizer.save_model(str(tmp_path / "t"))
    write_checkpoint(tmp_path / "step_5", config(), tokenizer=str(tmp_path / "t"))
    convert.to_hf(tmp_path / "step_5", tmp_path / "hf")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert exported.encode(TEXT) == tokenizer.encode(TEXT).ids
    assert exported.eos_token == end
    # And in, from a directory that has no other files of a tokenizer.
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tmp_path / "t" / name, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    convert.from_hf(tmp_path / "hf", tmp_path / "back")
    spec = open_checkpoint(tmp_path / "back").tokenizer
    assert load_tokenizer(spec).encode(TEXT) == tokenizer.encode(TEXT).ids
