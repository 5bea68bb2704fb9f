"""Declarations in the files beside a tokenizer, against transformers reading the same files."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from data_tools.errors import DataError
from data_tools.tokenization.tokenizers import load_tokenizer, tokenizer_fingerprint
from tests.data_tools.tokenization.tokenizer_folders import (
    TEXT,
    byte_level,
    declare,
    entry,
    sentencepiece_model,
)
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=DataError)

_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
_AS_OBJECT = {"__type": "AddedToken", **entry("<|im_end|>", lstrip=True)}
# What is declared beside a tokenizer.json whose added tokens are <|endoftext|> and <|im_end|>.
_BESIDE_JSON: dict[str, dict[str, dict[str, Any]]] = {
    "in tokenizer_config.json": {"tokenizer_config": {**_CLASS, "eos_token": "<|im_end|>"}},
    "as an object": {"tokenizer_config": {**_CLASS, "eos_token": _AS_OBJECT}},
    "in special_tokens_map.json": {
        "tokenizer_config": _CLASS,
        "special_tokens_map": {"eos_token": "<|im_end|>"},
    },
    "in both, the map counts": {
        "tokenizer_config": {**_CLASS, "eos_token": "<|endoftext|>"},
        "special_tokens_map": {"eos_token": entry("<|im_end|>")},
    },
    "in both, with added_tokens_decoder the map does not": {
        "tokenizer_config": {
            **_CLASS,
            "eos_token": "<|endoftext|>",
            "added_tokens_decoder": {"301": entry("<|im_end|>")},
        },
        "special_tokens_map": {"eos_token": "<|im_end|>"},
    },
    "new in added_tokens_decoder": {
        "tokenizer_config": {
            **_CLASS,
            "eos_token": "<|done|>",
            "added_tokens_decoder": {
                "302": entry("<|done|>"),
                "303": entry("<tool>", special=False),
            },
        },
    },
    "new in added_tokens.json": {
        "tokenizer_config": {**_CLASS, "eos_token": "<|done|>"},
        "added_tokens": {"<|done|>": 302, "<tool>": 303},
    },
    "in no vocabulary": {
        "tokenizer_config": {**_CLASS, "eos_token": "<|im_end|>", "pad_token": "[PAD]"}
    },
    "an ordinary piece": {"tokenizer_config": {**_CLASS, "eos_token": "water"}},
    "as an additional token": {
        "tokenizer_config": {
            **_CLASS,
            "eos_token": "<|im_end|>",
            "additional_special_tokens": ["<|done|>", "<tool>"],
        }
    },
    "split_special_tokens": {
        "tokenizer_config": {**_CLASS, "eos_token": "<|im_end|>", "split_special_tokens": True}
    },
}
_PARTS = [*TEXT.split(" "), " ", "  ", "<|im_end|>", "<|endoftext|>", "<|done|>", "<tool>", "[PAD]"]


def _mixtures(count: int = 60) -> list[str]:
    generator = random.Random(0)
    return ["".join(generator.choices(_PARTS, k=generator.randint(1, 9))) for _ in range(count)]


@pytest.mark.parametrize("begin", [None, "<|endoftext|>"])
@pytest.mark.parametrize("declared", _BESIDE_JSON)
def test_tokens_are_those_of_transformers_with_the_same_files(
    tmp_path: Path, declared: str, begin: str | None
) -> None:
    from transformers import AutoTokenizer

    byte_level(tmp_path, ["<|endoftext|>", "<|im_end|>"], begin=begin)
    declare(tmp_path, **_BESIDE_JSON[declared])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(str(tmp_path), special_tokens=None)
    assert ours.eod_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)
    assert ours.fingerprint == tokenizer_fingerprint(str(tmp_path))
    begins = list(ours.boundary_tokens.bos_ids(None))
    assert begins == ([] if begin is None else [theirs.convert_tokens_to_ids(begin)])
    plain = load_tokenizer(str(tmp_path), special_tokens="plain")
    for text in _mixtures():
        assert begins + ours.encode(text) == theirs(text).input_ids
        assert [*map(list, plain.encode_batch([text]))] == [
            theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        ]


_LLAMA = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "<|im_end|>",
    "unk_token": "<unk>",
}
_DECODER = {str(i): entry(token) for i, token in enumerate(("<unk>", "<s>", "</s>"))} | {
    "300": entry("<|im_start|>"),
    "301": entry("<|im_end|>"),
    "302": entry("<tool>", special=False),
}
_BESIDE_MODEL: dict[str, dict[str, dict[str, Any]]] = {
    "nothing added": {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}},
    "added_tokens_decoder": {"tokenizer_config": {**_LLAMA, "added_tokens_decoder": _DECODER}},
    "added_tokens.json": {
        "tokenizer_config": _LLAMA,
        "added_tokens": {"<|im_start|>": 300, "<|im_end|>": 301, "<tool>": 302},
    },
    "special_tokens_map.json": {
        "tokenizer_config": {"tokenizer_class": "LlamaTokenizer"},
        "special_tokens_map": {"eos_token": entry("<|im_end|>"), "pad_token": "<pad>"},
        "added_tokens": {"<|im_end|>": 300},
    },
    "add_bos_token": {
        "tokenizer_config": {**_LLAMA, "add_bos_token": True, "added_tokens_decoder": _DECODER}
    },
    "split_special_tokens": {
        "tokenizer_config": {
            **_LLAMA,
            "split_special_tokens": True,
            "added_tokens_decoder": _DECODER,
        }
    },
}


@pytest.mark.parametrize("declared", _BESIDE_MODEL)
def test_sentencepiece_tokens_are_those_of_transformers_with_the_same_files(
    tmp_path: Path, declared: str
) -> None:
    from transformers import AutoTokenizer

    sentencepiece_model(tmp_path, control_symbols=["<control>"])
    declare(tmp_path, **_BESIDE_MODEL[declared])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "LlamaTokenizer"
    ours = load_tokenizer(str(tmp_path), special_tokens=None)
    assert (ours.eod_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs))
    assert ours.fingerprint == tokenizer_fingerprint(str(tmp_path))
    begins = list(ours.boundary_tokens.bos_ids(None))
    plain = load_tokenizer(str(tmp_path), special_tokens="plain")
    # Before a space or a user defined symbol transformers leaves SentencePiece's dummy prefix out.
    words = ["river", "stone", "a", "<s>", "</s>", "<unk>", "<control>"]
    words += ["<|im_start|>", "<|im_end|>", "<tool>", "<pad>"]
    generator = random.Random(0)
    for _ in range(100):
        text = "".join(generator.choices(words, k=generator.randint(1, 7)))
        ids = ours.encode(text)
        assert begins + ids == theirs(text).input_ids, text
        assert ours.decode(ids, skip_special_tokens=False) == text
        assert [*map(list, plain.encode_batch([text]))] == [
            theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        ], text


def test_decoded_text_keeps_every_space_beside_special_tokens(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), special_tokens="parse")
    for text in ("  river</s> stone  <s>a", "</s> river", " "):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode([1, *tokenizer.encode("river stone"), 2]) == "river stone"
    assert tokenizer.decode([400]) == ""  # what a model with more ids may produce


def test_legacy_tokenizer_has_the_space_before_every_part(tmp_path: Path) -> None:
    """As SentencePiece encodes each part alone; what `legacy` in tokenizer_config.json means."""
    sentencepiece_model(tmp_path)
    parts = [load_tokenizer(str(tmp_path)).encode(part) for part in ("river", "stone")]
    declare(tmp_path, tokenizer_config={**_LLAMA, "eos_token": "</s>", "legacy": True})
    tokenizer = load_tokenizer(str(tmp_path), special_tokens="parse")
    assert tokenizer.encode("river</s>stone") == [*parts[0], 2, *parts[1]]


def test_end_token_of_generation_config_counts_where_it_is_a_special_token(tmp_path: Path) -> None:
    byte_level(tmp_path, ["<|endoftext|>", "<|im_end|>"])
    declare(tmp_path, generation_config={"eos_token_id": [301, 300]})
    end = load_tokenizer(str(tmp_path)).boundary_tokens.eod
    assert end is not None
    assert (end.ids, end.source) == ((301,), "declared in generation_config.json")
    # The default of a class that was saved with the model: 2 is the byte of a number sign here.
    declare(tmp_path, generation_config={"eos_token_id": 2}, config={"eos_token_id": 301})
    assert load_tokenizer(str(tmp_path)).eod_id == 301
    declare(tmp_path, config={"eos_token_id": 2})
    end = load_tokenizer(str(tmp_path)).boundary_tokens.eod
    assert end is not None
    assert (end.text, end.source) == ("<|endoftext|>", "a guess: no file declares one")


def test_fingerprint_is_that_of_the_file_unless_others_change_the_tokens(tmp_path: Path) -> None:
    byte_level(tmp_path, ["<|endoftext|>"])
    alone = tokenizer_fingerprint(str(tmp_path))
    declare(tmp_path, tokenizer_config={**_CLASS, "eos_token": "<|endoftext|>"})
    assert tokenizer_fingerprint(str(tmp_path)) == alone
    declare(tmp_path, added_tokens={"<tool>": 301})
    other = tokenizer_fingerprint(str(tmp_path))
    assert other == load_tokenizer(str(tmp_path)).fingerprint != alone


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (
            {"tokenizer_config": {"added_tokens_decoder": {"400": entry("<tool>")}}},
            ("tokenizer.json", "'<tool>'", ("400", "301"), "download"),
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": []}},
            ("tokenizer_config.json", "added_tokens_decoder", "object", "correct"),
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"x": entry("<tool>")}}},
            ("tokenizer_config.json", "'x'", "added_tokens_decoder", "correct"),
        ),
        (
            {"added_tokens": {"<tool>": "many"}},
            ("added_tokens.json", "'many'", "<tool>", "correct"),
        ),
        (
            {"special_tokens_map": {"eos_token": 7}},
            ("special_tokens_map.json", 7, "eos_token", "correct"),
        ),
        (
            {"tokenizer_config": {"extra_special_tokens": "<tool>"}},
            ("tokenizer_config.json", "extra_special_tokens", "list", "correct"),
        ),
    ],
)
def test_file_that_declares_nonsense_is_refused(
    tmp_path: Path, files: dict[str, Any], parts: tuple
) -> None:
    byte_level(tmp_path, [AddedToken("<|endoftext|>", special=True)])
    declare(tmp_path, **files)
    with _refused(*parts):
        load_tokenizer(str(tmp_path))
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(DataError, match=f"generation_config.json|{parts[0]}"):
        load_tokenizer(str(tmp_path))
