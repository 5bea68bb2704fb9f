from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from data_tools.tokenization.byte_bpe import FastByteBpe, _ranks

_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = Path(__file__).read_text() * 3 + "caf\u00e9 na\u00efve \u4f60\u597d aaaa aaa abab baba\n"


def _train(pattern: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS.splitlines(keepends=True), trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


_TOKENIZERS = {"as GPT-2": _train(None), "as Qwen": _train(_QWEN)}
_FAST = {name: FastByteBpe.of(tokenizer) for name, tokenizer in _TOKENIZERS.items()}
# Letters with marks and without, in one code point and in two, that fold case, and kinds of space.
_CODES = [[0xE9], [0x65, 0x301], [0x17F], [0x212A], [0x1E9B, 0x323], [0xB2], [0xFEFF], [0x85]]
_CODES += [[0x1C], [0xA0], [0x2028], [0x3000], [0xD, 0xA], [0xA, 0xA], [0x20, 0x20]]
_AWKWARD = ["".join(map(chr, codes)) for codes in _CODES]
_AWKWARD += ["'s", "'LL", "the", "aa", "ab", "12"]
_PIECES = st.one_of(st.sampled_from(_AWKWARD), st.text(max_size=4))


@pytest.mark.parametrize("name", _TOKENIZERS)
@given(text=st.lists(_PIECES, max_size=20).map("".join))
@settings(max_examples=400, deadline=None)
def test_ids_are_those_of_the_library(name: str, text: str) -> None:
    fast = _FAST[name]
    assert fast is not None
    assert fast.encode(text) in (None, _TOKENIZERS[name].encode(text).ids)


@pytest.mark.parametrize("name", _TOKENIZERS)
def test_ordinary_text_takes_the_fast_path(name: str) -> None:
    fast = _FAST[name]
    assert fast is not None
    assert fast.encode(_CORPUS) == _TOKENIZERS[name].encode(_CORPUS).ids


def _with_added_tokens(*, parse: bool) -> Tokenizer:
    tokenizer = _train(_QWEN)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_special_tokens([AddedToken("<|end|>x", special=True), AddedToken("\u0338")])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.encode_special_tokens = not parse
    return tokenizer


_WITH_ADDED = {parse: _with_added_tokens(parse=parse) for parse in (False, True)}
_FAST_WITH_ADDED = {parse: FastByteBpe.of(each) for parse, each in _WITH_ADDED.items()}
_SPELLED = ["<|end|>", "<|end|>x", "\u0338", "<tool>", "<|end", "|>", "x", " "]


@pytest.mark.parametrize("parse", [False, True])
@given(text=st.lists(st.one_of(st.sampled_from(_SPELLED), _PIECES), max_size=12).map("".join))
@settings(max_examples=400, deadline=None)
def test_added_tokens_in_a_text_are_found_as_the_library_finds_them(parse: bool, text: str) -> None:
    fast = _FAST_WITH_ADDED[parse]
    assert fast is not None
    assert fast.encode(text) in (None, _WITH_ADDED[parse].encode(text).ids)


def test_chat_text_takes_the_fast_path() -> None:
    text = "<|end|>user\nhello caf\u00e9<tool>1<|end|>x\n" * 3
    for parse, fast in _FAST_WITH_ADDED.items():
        assert fast is not None
        assert fast.encode(text) == _WITH_ADDED[parse].encode(text).ids


def test_text_on_which_the_two_could_differ_falls_back_to_the_library() -> None:
    tokenizer = _train(_QWEN)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    fast = FastByteBpe.of(tokenizer)
    assert fast is not None
    assert fast.encode("a <|end|> b") == tokenizer.encode("a <|end|> b").ids
    # An added token, the same before a combining character changes its last letter, and a long run.
    for text in ("a <think> b", "a <think>\u0338 b", " " * 2_000_000):
        assert fast.encode(text) is None


def _set(*path: str | int, to: object) -> Callable[[Any], None]:
    def change(spec: Any) -> None:
        for key in path[:-1]:
            spec = spec[key]
        spec[path[-1]] = to

    return change


def _swap_two_merges(spec: Any) -> None:
    merges = spec["model"]["merges"]
    merges[3], merges[300] = merges[300], merges[3]


@pytest.mark.parametrize(
    "change",
    [
        _set("normalizer", to={"type": "NFKC"}),
        _set("pre_tokenizer", to=None),
        _set("pre_tokenizer", "pretokenizers", 0, "behavior", to="Removed"),
        _set("pre_tokenizer", "pretokenizers", 1, "use_regex", to=True),
        _set("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", to=True),
        _set("model", "dropout", to=0.1),
        _set("model", "ignore_merges", to=True),
        _swap_two_merges,
    ],
)
def test_tokenizer_of_another_kind_has_no_fast_path(change: Callable[[Any], None]) -> None:
    spec = json.loads(_TOKENIZERS["as Qwen"].to_str())
    change(spec)
    assert FastByteBpe.of(Tokenizer.from_str(json.dumps(spec))) is None


def test_vocabulary_with_a_token_that_does_not_merge_to_itself_has_no_fast_path() -> None:
    """abc is the merge of ab and c, but b and c are merged first: it is never found."""
    spec = json.loads(_TOKENIZERS["as GPT-2"].to_str())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(letters)}
    spec["model"]["vocab"] = vocab | {"bc": 256, "ab": 257, "abc": 258}
    spec["model"]["merges"] = [["b", "c"], ["a", "b"], ["ab", "c"]]
    assert FastByteBpe.of(Tokenizer.from_str(json.dumps(spec))) is None


def _model() -> dict[str, Any]:
    """The `model` of a tokenizer.json with two merges."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "wo", "wor"]
    backend = models.BPE({t: i for i, t in enumerate(tokens)}, [("w", "o"), ("wo", "r")])
    return json.loads(Tokenizer(backend).to_str())["model"]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model["vocab"].pop("wor"),
        lambda model: model["vocab"].update(wor=999, wo=model["vocab"]["a"]),
        lambda model: model["vocab"].update({"w\u4e00": 999}) or model["merges"].append("w\u4e00"),
    ],
    ids=["a merge that is no token", "two tokens of one id", "a letter that is no byte"],
)
def test_an_unsupported_model_falls_back_to_the_library(change: Callable[[Any], object]) -> None:
    model = _model()
    assert _ranks(model) is not None
    change(model)
    assert _ranks(model) is None
