"""Tokenizers of the kinds that llama.cpp holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from tests.models.hf.tokenizer_files import TRAINED_HERE, sentencepiece_file

VOCAB_SIZE = 4500  # more than any of them has

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _WORDS + r"\p{N}" + _REST
_LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
_ADDED = ("<|endoftext|>", "<|chat|>")


class Kind(NamedTuple):
    """`write` makes a file in a folder. `pre`: llama.cpp's name of how text is split."""

    pre: str
    write: Callable[[Path], Path]


def _byte_level(folder: Path, *, split: str | None, nfc: bool = False, **model: Any) -> Path:
    """A byte-level tokenizer.json that merges across every boundary where its text is not split:
    each byte with a letter, a digit, a sign, a quote and white space on either side."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    around = ("a", "1", "!", "'", "s", "S", "\u0120", "\u010a")  # the last are space and line feed
    ordered = [pair for x in around for y in letters for pair in ((x, y), (y, x))]
    merges = list(dict.fromkeys(ordered))
    vocabulary = [*letters, *("".join(pair) for pair in merges)]
    numbers = {text: number for number, text in enumerate(vocabulary)}
    tokenizer = Tokenizer(BPE(vocab=numbers, merges=merges, **model))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split is not None:
        words = pre_tokenizers.Split(Regex(split), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_ADDED))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def _digits(folder: Path) -> Path:
    path = _byte_level(folder, split=None)
    tokenizer = Tokenizer.from_file(str(path))
    steps = [pre_tokenizers.Digits(individual_digits=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False)])
    tokenizer.add_tokens(["    ", "  "])
    tokenizer.save(str(path))
    return path


def _pieces(folder: Path, **settings: Any) -> Path:
    return sentencepiece_file(folder / "tokenizer.model", **settings)


KINDS = {
    "gpt2 json": Kind("gpt-2", partial(_byte_level, split=None)),
    "qwen2 json": Kind("qwen2", partial(_byte_level, split=_QWEN2, nfc=True)),
    "llama3 json": Kind("llama-bpe", partial(_byte_level, split=_LLAMA3, ignore_merges=True)),
    "merged llama3 json": Kind("smaug-bpe", partial(_byte_level, split=_LLAMA3)),
    "digits json": Kind("smollm", _digits),
    "prefix model": Kind("default", partial(_pieces, add_dummy_prefix=True)),
    "our model": Kind("default", partial(_pieces, **TRAINED_HERE)),
}
