"""Byte-level BPE as llama.cpp's `gpt2` vocabulary: tokenizer.json, and bytes."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from typing import Any

from models.gguf.vocabulary import (
    INSTEAD,
    Token,
    TokenType,
    Vocabulary,
    check_user_defined,
    filled,
    spelt_remark,
)

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_SPELT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The regular expression of words, and whether a word that is a token is taken without merges ->
# llama.cpp's name of both.
_NAMES = {
    (_GPT2, False): "gpt-2",
    (rf"{_WORDS}\p{{N}}{_REST}", False): "qwen2",
    (rf"{_WORDS}\p{{N}}{{1,3}}{_REST}", True): "llama-bpe",
    (rf"{_WORDS}\p{{N}}{{1,3}}{_REST}", False): "smaug-bpe",
    (rf"\p{{N}}, then {_GPT2}", False): "smollm",
}
# What the model of a tokenizer.json may not set, and the values that set nothing.
_UNSET = {
    "dropout": (None, 0.0),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
}
_END_OF_DOCUMENT = "<|endoftext|>"


def byte_vocabulary(size: int) -> Vocabulary:
    """UTF-8 bytes as ids 0..255, and 256 for the end of a document."""
    tokens = {i: Token(letter) for i, letter in enumerate(_letters())}
    tokens[len(tokens)] = Token(_END_OF_DOCUMENT, TokenType.CONTROL)
    # llama.cpp demands a merge; no word has these parts.
    never = f"{_END_OF_DOCUMENT} {_END_OF_DOCUMENT}"
    return Vocabulary("gpt2", filled(tokens, size, source="bytes"), pre="gpt-2", merges=(never,))


def bpe_vocabulary(text: str, size: int, *, source: str) -> Vocabulary:
    """The vocabulary of a tokenizer.json, whose contents are `text`, for a model of `size` ids.

    Raises:
        ValueError: llama.cpp has no equal tokenizer.
    """
    contents: dict[str, Any] = json.loads(text)
    model = contents["model"]
    _check_kind(contents, source=source)
    pre = _pre_tokenizer(contents, source=source)
    known = {number: Token(token) for token, number in model["vocab"].items()}
    if missing := set(_letters()) - set(model["vocab"]):
        raise ValueError(
            f"tokenizer {source} has no token for {len(missing)} of the 256 bytes, which llama.cpp "
            f"would leave out of a text; {INSTEAD}"
        )
    for token in contents["added_tokens"]:
        _check_flags(token, source=source)
        _check_normal_form(token, contents["normalizer"], source=source)
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        known[token["id"]] = Token(token["content"], kind)
    found = (t.text for t in known.values() if t.type == TokenType.USER_DEFINED)
    remarks = check_user_defined(found, source=source)
    if model.get("ignore_merges"):
        remarks += spelt_remark(_single_words(text, contents))
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    if contents["normalizer"] is not None:
        remarks.append(
            "llama.cpp does not normalise text: give it text in NFC, as the tokenizer makes it"
        )
    return Vocabulary(
        "gpt2",
        filled(known, size, source=source),
        pre=pre,
        merges=tuple(merges),
        remarks=tuple(remarks),
    )


def _check_kind(contents: Mapping[str, Any], *, source: str) -> None:
    model, normalizer = contents["model"], contents["normalizer"]
    given = {
        "model": model["type"],
        "normalizer": None if normalizer is None else normalizer["type"],
        "decoder": None if contents["decoder"] is None else contents["decoder"]["type"],
    }
    allowed: dict[str, tuple[object, ...]] = {
        "model": ("BPE",),
        "normalizer": (None, "NFC"),
        "decoder": ("ByteLevel",),
    }
    if model["type"] == "BPE":
        given |= {name: model.get(name) for name in _UNSET}
        allowed |= _UNSET
        if not model["merges"]:
            raise ValueError(f"tokenizer {source}: merges=[], llama.cpp needs one; {INSTEAD}")
    for name, value in given.items():
        if value not in allowed[name]:
            raise ValueError(
                f"tokenizer {source}: {name}={value!r}, llama.cpp's byte-level BPE has "
                f"{' or '.join(map(repr, allowed[name]))}; give a SentencePiece .model with "
                f"--tokenizer if it comes from one, or {INSTEAD}"
            )


def _pre_tokenizer(contents: Mapping[str, Any], *, source: str) -> str:
    """llama.cpp's name of the way in which a tokenizer.json splits text.

    Raises:
        ValueError: it has none.
    """
    pattern = _pattern(contents["pre_tokenizer"])
    whole_words = bool(contents["model"].get("ignore_merges"))
    name = None if pattern is None else _NAMES.get((pattern, whole_words))
    if name is None:
        spec = json.dumps(contents["pre_tokenizer"], ensure_ascii=True)
        raise ValueError(
            f"tokenizer {source}: pre_tokenizer={spec[:200]} with ignore_merges={whole_words}, "
            f"llama.cpp is known to split text like {', '.join(_NAMES.values())} only; {INSTEAD}"
        )
    return name


def _pattern(spec: Any) -> str | None:
    """The regular expression of a pre-tokenizer, None if it is none of the usual forms."""
    steps = [spec] if spec is None or spec["type"] != "Sequence" else spec["pretokenizers"]
    *before, last = steps
    if last is None or last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"]:
        digits = {"type": "Digits", "individual_digits": True}
        return {"[]": _GPT2, str([digits]): rf"\p{{N}}, then {_GPT2}"}.get(str(before))
    if len(before) != 1 or before[0]["type"] != "Split":
        return None
    split = before[0]
    if split["behavior"] != "Isolated" or split["invert"]:
        return None
    pattern: str | None = split["pattern"].get("Regex")
    return _GPT2 if pattern == _GPT2_SPELT else pattern


def _check_flags(token: Mapping[str, Any], *, source: str) -> None:
    for flag in ("single_word", "lstrip", "rstrip"):
        if token[flag]:
            raise ValueError(
                f"tokenizer {source}: the added token {token['content']!r} has {flag}=True, "
                f"llama.cpp has no such tokens; {INSTEAD}"
            )


def _check_normal_form(token: Mapping[str, Any], normalizer: Any, *, source: str) -> None:
    content = token["content"]
    composed = unicodedata.normalize("NFC", content)
    if normalizer is not None and token["normalized"] and content != composed:
        raise ValueError(
            f"tokenizer {source}: the added token {content!a} is found as {composed!a} "
            "(normalized=True), llama.cpp would look for it as it is written; write it in NFC, or "
            f"{INSTEAD}"
        )


def _single_words(text: str, contents: Mapping[str, Any]) -> list[str]:
    """Special tokens that are words which llama.cpp looks up among all tokens, the library only
    among those of its model."""
    from tokenizers import Tokenizer

    split = Tokenizer.from_str(text).pre_tokenizer.pre_tokenize_str
    added = (token["content"] for token in contents["added_tokens"] if token["special"])
    others = (content for content in added if content not in contents["model"]["vocab"])
    return [content for content in others if [word for word, _ in split(content)] == [content]]


def _letters() -> list[str]:
    """The character that stands for each byte, in the order of the bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters: dict[int, str] = bytes_to_unicode()
    return [letters[byte] for byte in range(256)]
