"""A prompt becomes tokens as the documents of training did, or as in transformers."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import transformers

from models import convert, generate
from models.prompting import load_prompting
from parallel.checkpoint.manifest import UNKNOWN_TEXT, TextRecord
from tests.data_tools.tokenization.tokenizer_folders import byte_level, declare
from tests.models.checkpoints import config, write_checkpoint
from tests.refusals import assert_refused, error_line

PROMPT = "<|im_start|>river stone"


@pytest.fixture
def tokenizer(tmp_path) -> str:
    """<|begin|> 300, which its post-processor adds, <|end|> 301, <|im_start|> 302."""
    folder = byte_level(tmp_path / "t", ["<|begin|>", "<|end|>", "<|im_start|>"], begin="<|begin|>")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    return str(declare(folder, tokenizer_config={**settings, "bos_token": "<|begin|>"}))


@pytest.mark.parametrize(
    ("text", "settings", "begins", "parsed", "eod_id"),
    [
        (UNKNOWN_TEXT, {}, True, True, 301),
        (TextRecord(eod_id=302, bos_ids=(), special_tokens="plain"), {}, False, False, 302),
        (TextRecord(eod_id=302, bos_ids=(300,), special_tokens="parse"), {}, True, True, 302),
        (TextRecord(eod_id=None, bos_ids=(), special_tokens="plain"), {}, False, False, 301),
        (
            TextRecord(eod_id=302, bos_ids=(), special_tokens="plain"),
            {"add_bos": True},
            True,
            False,
            302,
        ),
        (
            TextRecord(eod_id=302, bos_ids=(300,), special_tokens="plain"),
            {"add_bos": False},
            False,
            False,
            302,
        ),
        (
            TextRecord(eod_id=302, bos_ids=(300,), special_tokens="plain"),
            {"special_tokens": "parse"},
            True,
            True,
            302,
        ),
        (
            TextRecord(eod_id=302, bos_ids=(), special_tokens="plain"),
            {"eod": "<|begin|>"},
            False,
            False,
            300,
        ),
    ],
)
def test_what_a_setting_does_not_say_is_done_as_in_training(
    tokenizer: str,
    text: TextRecord,
    settings: dict[str, Any],
    begins: bool,
    parsed: bool,
    eod_id: int,
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer)
    expected = theirs.encode(PROMPT, add_special_tokens=begins, split_special_tokens=not parsed)
    prompting = load_prompting(tokenizer, text, **settings)
    assert prompting.encode(PROMPT, vocab_size=303) == expected
    assert prompting.eod_id == eod_id


def test_empty_prompt_is_what_a_document_begins_with_or_after(tmp_path, tokenizer: str) -> None:
    assert load_prompting(tokenizer, UNKNOWN_TEXT).encode("", vocab_size=303) == [300]
    text = TextRecord(eod_id=301, bos_ids=(), special_tokens="plain")
    assert load_prompting(tokenizer, text).encode("", vocab_size=303) == [301]
    nameless = str(byte_level(tmp_path / "nameless"))
    with assert_refused("prompt", value="empty", constraint="token", remedy="--eod"):
        load_prompting(nameless, UNKNOWN_TEXT).encode("", vocab_size=303)


def test_the_command_line_continues_a_prompt_as_transformers_does(
    tmp_path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model sees the begin token: without it the continuation is another one."""
    write_checkpoint(tmp_path / "step_0", config(vocab_size=303), tokenizer=tokenizer)
    convert.to_hf(tmp_path / "step_0", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    inputs = theirs(PROMPT, return_tensors="pt")
    rows = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
    line = ["--checkpoint", str(tmp_path / "step_0"), "--prompt", PROMPT, "--temperature", "0"]
    line += ["--max-new-tokens", "12", "--device", "cpu"]
    expected = theirs.decode(rows[0], skip_special_tokens=True)
    assert generate.main(line) == 0
    assert capsys.readouterr().out.rstrip("\n") == expected.rstrip("\n")
    for changed in (["--no-add-bos"], ["--special-tokens", "plain"]):
        assert generate.main([*line, *changed]) == 0
        assert capsys.readouterr().out.rstrip("\n") != expected.rstrip("\n")
    assert generate.main([*line, "--eod", "<no>"]) == 2
    assert "<no> is not in its vocabulary" in capsys.readouterr().err
    for name, value, constraint, remedy in (
        ("--seed", 2**64, "-2**63", "smaller"),
        ("--device", "tpu", "cannot be used", "cpu"),
    ):
        assert generate.main([*line, name, str(value)]) == 2
        with assert_refused(name, value, constraint, remedy):
            raise ValueError(error_line(capsys).removeprefix("error: ").rstrip("\n"))


def test_bytes_that_are_no_text_are_a_prompt_of_a_byte_model_alone(tokenizer):
    """As a shell passes the first of the two bytes of a letter."""
    prompt = os.fsdecode("Türk".encode()[:2])
    text = TextRecord(eod_id=None, bos_ids=(), special_tokens="plain")
    assert load_prompting("bytes", text).encode(prompt, vocab_size=257) == [0x54, 0xC3]
    with assert_refused("prompt", value="udcc3", constraint="not UTF-8", remedy="write"):
        load_prompting(tokenizer, text).encode(prompt, vocab_size=400)
