from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from data_tools.tokenization import byte_bpe
from data_tools.tokenization.byte_bpe import FastByteBpe
from data_tools.tokenization.byte_encoders import (
    GPT2_PATTERN,
    EncoderName,
    TiktokenEncoder,
    ranks_of,
)

_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = Path(__file__).read_text() * 3 + "caf\u00e9 na\u00efve \u4f60\u597d aaaa aaa abab baba\n"


def _train(pattern: str | None, corpus: str = _CORPUS) -> Tokenizer:
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
    tokenizer.train_from_iterator(corpus.splitlines(keepends=True), trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


_TOKENIZERS = {"as GPT-2": _train(None), "as Qwen": _train(_QWEN)}
_ENCODERS = ("gigatoken", "tiktoken")
_FAST = {
    (name, encoder): FastByteBpe.of(tokenizer, encoder)
    for name, tokenizer in _TOKENIZERS.items()
    for encoder in _ENCODERS
}
# Letters with marks and without, in one code point and in two, that fold case, and kinds of space.
_CODES = [[0xE9], [0x65, 0x301], [0x17F], [0x212A], [0x1E9B, 0x323], [0xB2], [0xFEFF], [0x85]]
_CODES += [[0x1C], [0xA0], [0x2028], [0x3000], [0xD, 0xA], [0xA, 0xA], [0x20, 0x20]]
# Marks out of order, letters that consist of two, and characters newer than some Unicode tables.
_CODES += [[0x323, 0x301], [0x301, 0x323], [0x1100, 0x1161], [0x9C7, 0x9BE], [0x340], [0x1F77]]
_CODES += [[0x378], [0x61, 0x1AC1, 0x301], [0x105D2, 0x307], [0x11935, 0x11930]]
_AWKWARD = ["".join(map(chr, codes)) for codes in _CODES]
_AWKWARD += ["'s", "'LL", "the", "aa", "ab", "12"]
_PIECES = st.one_of(st.sampled_from(_AWKWARD), st.text(max_size=4))


@pytest.mark.parametrize(("name", "encoder"), _FAST)
@given(text=st.lists(_PIECES, max_size=20).map("".join))
@settings(max_examples=400, deadline=None)
def test_ids_are_those_of_the_library(name: str, encoder: str, text: str) -> None:
    fast = _FAST[name, encoder]
    assert fast is not None
    assert fast.encoder.name == encoder
    ids = _TOKENIZERS[name].encode(text).ids
    assert fast.encode(text) in (None, ids)
    [found] = fast.encode_batch([text])
    assert found is None or list(found) == ids


@pytest.mark.parametrize(("name", "encoder"), _FAST)
def test_ordinary_text_takes_the_fast_path(name: str, encoder: str) -> None:
    fast = _FAST[name, encoder]
    assert fast is not None
    texts = [_CORPUS, "", *_CORPUS.splitlines(keepends=True)]
    ids = [each.ids for each in _TOKENIZERS[name].encode_batch(texts)]
    assert [fast.encode(text) for text in texts] == ids
    assert [None if each is None else list(each) for each in fast.encode_batch(texts)] == ids


def test_text_with_a_character_that_pythons_tables_lack_is_normalized_by_the_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python takes it for a letter of its own, with which nothing is composed."""
    monkeypatch.setattr(byte_bpe.unicodedata, "is_normalized", lambda form, text: True)
    tokenizer = _TOKENIZERS["as Qwen"]
    fast = FastByteBpe.of(tokenizer)
    assert fast is not None
    text = "cafe\u0301 \u0378"
    assert fast.encode(text) == tokenizer.encode(text).ids
    assert fast.encode(text[:-1]) != tokenizer.encode(text[:-1]).ids


def test_threads_that_share_an_encoder_get_the_same_ids() -> None:
    texts = [f"{number} {_CORPUS[number:][:200]} caf\u00e9 e\u0301" for number in range(300)]
    for tokenizer in _TOKENIZERS.values():
        fast = FastByteBpe.of(tokenizer, "gigatoken")
        assert fast is not None
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(fast.encode, texts))
        assert found == [each.ids for each in tokenizer.encode_batch(texts)]


def test_the_first_library_that_supports_a_tokenizer_encodes_for_it() -> None:
    for tokenizer in _TOKENIZERS.values():
        fast = FastByteBpe.of(tokenizer)
        assert fast is not None
        assert fast.encoder.name == "gigatoken"
    spec = json.loads(_TOKENIZERS["as Qwen"].to_str())
    # A pattern that only one of them has: any run of letters, or one character.
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\P{L}"
    other = Tokenizer.from_str(json.dumps(spec))
    assert FastByteBpe.of(other, "gigatoken") is None
    fast = FastByteBpe.of(other)
    assert fast is not None
    assert fast.encoder.name == "tiktoken"
    assert fast.encode(_CORPUS) == other.encode(_CORPUS).ids


def _with_added_tokens(*, parse: bool) -> Tokenizer:
    tokenizer = _train(_QWEN)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_special_tokens([AddedToken("<|end|>x", special=True), AddedToken("\u0338")])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.encode_special_tokens = not parse
    return tokenizer


_WITH_ADDED = {parse: _with_added_tokens(parse=parse) for parse in (False, True)}
_FAST_WITH_ADDED = {
    (parse, encoder): FastByteBpe.of(each, encoder)
    for parse, each in _WITH_ADDED.items()
    for encoder in _ENCODERS
}
_SPELLED = ["<|end|>", "<|end|>x", "\u0338", "<tool>", "<|end", "|>", "x", " "]


@pytest.mark.parametrize(("parse", "encoder"), _FAST_WITH_ADDED)
@given(text=st.lists(st.one_of(st.sampled_from(_SPELLED), _PIECES), max_size=12).map("".join))
@settings(max_examples=400, deadline=None)
def test_added_tokens_in_a_text_are_found_as_the_library_finds_them(
    parse: bool, encoder: str, text: str
) -> None:
    fast = _FAST_WITH_ADDED[parse, encoder]
    assert fast is not None
    ids = _WITH_ADDED[parse].encode(text).ids
    assert fast.encode(text) in (None, ids)
    [found] = fast.encode_batch([text])
    assert found is None or list(found) == ids


def test_chat_text_takes_the_fast_path() -> None:
    text = "<|end|>user\nhello caf\u00e9<tool>1<|end|>x\n" * 3
    for (parse, _), fast in _FAST_WITH_ADDED.items():
        assert fast is not None
        assert fast.encode(text) == _WITH_ADDED[parse].encode(text).ids


@pytest.mark.parametrize("encoder", _ENCODERS)
def test_text_on_which_the_two_could_differ_falls_back_to_the_library(encoder: str) -> None:
    tokenizer = _train(_QWEN)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    fast = FastByteBpe.of(tokenizer, encoder)
    assert fast is not None
    assert fast.encode("a <|end|> b") == tokenizer.encode("a <|end|> b").ids
    # An added token, and the same before a combining character changes its last letter.
    for text in ("a <think> b", "a <think>\u0338 b"):
        assert fast.encode(text) is None
        assert fast.encode_batch([text]) == [None]
    long = " " * 200_000
    assert fast.encode(long) == (None if encoder == "tiktoken" else tokenizer.encode(long).ids)


@pytest.mark.parametrize(
    ("theirs", "ours", "text"),
    [
        (r"\p{N}", r"\p{Nd}", "12\u00b212"),  # superscripts are numbers, but no digits
        (r"\p{N}", "0-46-9", "12512"),
    ],
    ids=["beyond ASCII", "ASCII"],
)
def test_text_with_a_character_that_the_encoder_splits_otherwise_falls_back(
    theirs: str, ours: str, text: str
) -> None:
    backend = _train(None, f"{text} " * 9)
    ranks = ranks_of(json.loads(backend.to_str())["model"])
    assert ranks is not None
    pattern = GPT2_PATTERN.replace(f" ?{theirs}", f" ?[{ours}]").replace(theirs, ours)
    fast = FastByteBpe(backend, TiktokenEncoder(pattern, ranks))
    others = ["a b 12!", "caf\u00e9 \u4f60\u597d 12"]
    for _ in range(2):  # compared, then remembered
        found = fast.encode_batch([others[0], text, others[1]])
        assert found == [backend.encode(others[0]).ids, None, backend.encode(others[1]).ids]


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
    ],
)
def test_tokenizer_of_another_kind_has_no_fast_path(change: Callable[[Any], None]) -> None:
    spec = json.loads(_TOKENIZERS["as Qwen"].to_str())
    change(spec)
    assert FastByteBpe.of(Tokenizer.from_str(json.dumps(spec))) is None


def _assert_only_gigatoken(spec: Any, text: str) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    assert FastByteBpe.of(tokenizer, "tiktoken") is None
    fast = FastByteBpe.of(tokenizer)
    assert fast is not None
    assert fast.encode(text) == tokenizer.encode(text).ids


@pytest.mark.parametrize("encoder", _ENCODERS)
def test_a_tokenizer_whose_list_of_steps_is_empty_has_no_fast_path(encoder: EncoderName) -> None:
    spec = json.loads(_TOKENIZERS["as GPT-2"].to_str())
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": []}
    assert FastByteBpe.of(Tokenizer.from_str(json.dumps(spec)), encoder) is None


def test_merges_that_are_not_in_the_order_of_ids_are_not_those_of_tiktoken() -> None:
    spec = json.loads(_TOKENIZERS["as Qwen"].to_str())
    _swap_two_merges(spec)
    _assert_only_gigatoken(spec, _CORPUS)


def test_a_token_that_does_not_merge_to_itself_is_found_by_tiktoken_alone() -> None:
    """abc is the merge of ab and c, but b and c are merged first: it is never found."""
    spec = json.loads(_TOKENIZERS["as GPT-2"].to_str())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(letters)}
    spec["model"]["vocab"] = vocab | {"bc": 256, "ab": 257, "abc": 258}
    spec["model"]["merges"] = [["b", "c"], ["a", "b"], ["ab", "c"]]
    _assert_only_gigatoken(spec, "abc ab bc aabcc")


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
    assert ranks_of(model) is not None
    change(model)
    assert ranks_of(model) is None
