"""Tokenizers that llama.cpp holds, without llama.cpp; test_tokens.py runs them in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from models.gguf.byte_level import bpe_vocabulary, byte_vocabulary
from models.gguf.pieces import Declared, piece_vocabulary
from models.gguf.vocabulary import TokenType, Vocabulary
from tests.models.gguf.tokenizer_kinds import KINDS, VOCAB_SIZE
from tests.models.hf.tokenizer_files import hugging_face_file, sentencepiece_file
from tests.refusals import assert_refused

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _bpe(
    folder: Path, change: Callable[[dict[str, Any]], Any] = lambda contents: None, size: int = 301
) -> Vocabulary:
    contents = json.loads(hugging_face_file(folder / "t.json").read_text())
    change(contents)
    return bpe_vocabulary(json.dumps(contents), size, source="t.json")


def test_ids_that_the_tokenizer_lacks_are_unused(tmp_path):
    found = _bpe(tmp_path)
    assert len(found.tokens) == 301
    assert found.tokens[288].type == TokenType.UNUSED
    assert found.tokens[287] == ("<|endoftext|>", TokenType.CONTROL, 0.0)
    assert found.pre == "gpt-2"


@pytest.mark.parametrize("kind", [k for k in KINDS if k.endswith("json")])
def test_the_way_of_splitting_text_is_named(kind, tmp_path):
    path = KINDS[kind].write(tmp_path)
    found = bpe_vocabulary(path.read_text(), VOCAB_SIZE, source=str(path))
    assert found.pre == KINDS[kind].pre
    assert bool(found.remarks) == (KINDS[kind].pre == "qwen2")  # of its normalizer


def test_bytes_are_letters_that_never_merge():
    found = byte_vocabulary(260)
    assert [token.text for token in found.tokens[65:68]] == ["A", "B", "C"]
    assert found.tokens[256].type == TokenType.CONTROL
    texts = {token.text for token in found.tokens[:256]}
    assert not any(set(merge.split()) & texts for merge in found.merges)


def _added(content: str, **flags: bool) -> Callable[[dict[str, Any]], None]:
    token = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)

    def change(contents: dict[str, Any]) -> None:
        number = max(each["id"] for each in contents["added_tokens"]) + 1
        contents["added_tokens"].append(token | {"id": number, "content": content} | flags)

    return change


def _both(*changes: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def change(contents: dict[str, Any]) -> None:
        for each in changes:
            each(contents)

    return change


def _setting(part: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda contents: contents.update({part: value})


def _of_model(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda contents: contents["model"].update({name: value})


@pytest.mark.parametrize(
    ("change", "value", "constraint"),
    [
        (_setting("pre_tokenizer", GPT2 | {"add_prefix_space": True}), '"ByteLevel"', "gpt-2"),
        (_setting("pre_tokenizer", GPT2 | {"use_regex": False}), '"ByteLevel"', "gpt-2"),
        (_of_model("ignore_merges", True), True, "gpt-2"),
        (_setting("normalizer", {"type": "Lowercase"}), "'Lowercase'", "'NFC'"),
        (_setting("decoder", None), None, "'ByteLevel'"),
        (_of_model("byte_fallback", True), True, "byte_fallback"),
        (_of_model("unk_token", "<unk>"), "'<unk>'", "unk_token"),
        (_of_model("merges", []), "[]", "merges"),
        (lambda contents: contents["model"]["vocab"].pop("A"), 1, "256 bytes"),
        (_added("<a>", lstrip=True, special=True), "'<a>'", "lstrip=True"),
        (_both(_added("ab"), _added("bcd")), "'ab'", ("'bcd'", "overlap")),
        (
            _both(_setting("normalizer", {"type": "NFC"}), _added("e\u0301", normalized=True)),
            r"'e\u0301'",
            (r"'\xe9'", "normalized=True"),
        ),
    ],
)
def test_what_llama_cpp_does_otherwise_is_refused(change, value, constraint, tmp_path):
    with assert_refused("t.json", value=value, constraint=constraint, remedy="--no-tokenizer"):
        _bpe(tmp_path, change, size=303)


def test_runs_of_one_character_are_cut_alike_and_not_refused(tmp_path):
    found = _bpe(tmp_path, _both(_added("   "), _added("  ")), size=303)
    assert [t.type for t in found.tokens[288:290]] == [TokenType.USER_DEFINED] * 2


def test_tokens_that_llama_cpp_knows_by_name_are_remarked_on(tmp_path):
    """Those of Qwen2.5 among them, where they are found in plain text."""
    (remark,) = _bpe(tmp_path, _both(_added("<|fim_prefix|>"), _added("<think>"))).remarks
    assert "<|fim_prefix|>" in remark
    assert "<think>" not in remark


def test_only_tokens_that_text_never_has_may_be_beyond_the_model(tmp_path):
    assert len(_bpe(tmp_path, size=287).tokens) == 287
    with assert_refused("t.json", value=286, constraint="vocab_size=286", remedy="--tokenizer"):
        _bpe(tmp_path, size=286)


def test_pieces_keep_scores_and_types(tmp_path):
    path = sentencepiece_file(tmp_path / "t.model", add_dummy_prefix=True)
    found = piece_vocabulary(path, 300)
    assert [token.type for token in found.tokens[:4]] == [
        TokenType.UNKNOWN,
        TokenType.CONTROL,
        TokenType.CONTROL,
        TokenType.BYTE,
    ]
    assert found.prefix
    assert found.unknown == 0
    assert found.tokens[259].score == 0
    assert found.tokens[260].score == -1
    (remark,) = found.remarks
    assert "add_dummy_prefix" in remark


def test_tokens_beside_a_model_are_added_unless_text_has_them(tmp_path):
    path = sentencepiece_file(tmp_path / "t.model")
    declared = {"<|chat|>": Declared(290, special=True), "</s>": Declared(2, special=False)}
    found = piece_vocabulary(path, 292, declared=declared)
    assert found.tokens[290] == ("<|chat|>", TokenType.CONTROL, 0.0)
    assert found.tokens[2].text == "</s>"
    with assert_refused("t.model", value="'<x>'", constraint="plain text", remedy="--no-tokenizer"):
        piece_vocabulary(path, 292, declared={"<x>": Declared(290, special=False)})


@pytest.mark.parametrize(
    ("changes", "value", "constraint"),
    [
        ({"model_type": "unigram", "vocab_size": 285}, "unigram", "byte-pair"),
        ({"normalization_rule_name": "nmt_nfkc"}, "nmt_nfkc", "byte-pair"),
        ({"byte_fallback": False, "vocab_size": 40}, False, "byte_fallback"),
        ({"remove_extra_whitespaces": True}, True, "remove_extra_whitespaces"),
        ({"treat_whitespace_as_suffix": True}, True, "treat_whitespace_as_suffix"),
        ({"user_defined_symbols": ["\n"]}, "'\\n'", "add_dummy_prefix=True"),
        ({"user_defined_symbols": ["a b"], "add_dummy_prefix": False}, "'a b'", "spaces"),
    ],
)
def test_a_model_that_llama_cpp_reads_otherwise_is_refused(changes, value, constraint, tmp_path):
    path = sentencepiece_file(tmp_path / "t.model", **changes)
    with assert_refused("t.model", value=value, constraint=constraint, remedy="--no-tokenizer"):
        piece_vocabulary(path, 300)


def test_a_special_token_that_other_tokens_make_up_is_remarked_on(tmp_path):
    settings = {"pad_id": 3, "pad_piece": "<pad>", "add_dummy_prefix": False}
    path = sentencepiece_file(tmp_path / "t.model", eos_piece="!?", **settings)
    (remark,) = piece_vocabulary(path, 300).remarks
    assert "!?" in remark
    assert "<pad>" not in remark


def test_an_added_token_is_an_added_token(tmp_path):
    """Tokens of `tokenizers` are written as this file writes them."""
    contents = json.loads(hugging_face_file(tmp_path / "t.json").read_text())
    own = AddedToken("<a>", special=True)
    (token,) = contents["added_tokens"]
    assert set(token) == {"id", *(n for n in dir(own) if not n.startswith("_"))}
