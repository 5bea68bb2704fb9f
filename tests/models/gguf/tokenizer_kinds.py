"""Tokenizers of the kinds that llama.cpp holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, pre_tokenizers

from tests.models.hf.tokenizer_files import hugging_face_file, sentencepiece_file

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _WORDS + r"\p{N}" + _REST
_LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
_ADDED = ("<|endoftext|>", "<|chat|>")


class Kind(NamedTuple):
    """`write` makes a file in a folder. `pre`: llama.cpp's name of how text is split."""

    pre: str
    write: Callable[[Path], Path]


def _byte_level(folder: Path, *, split: str | None, **model: Any) -> Path:
    path = hugging_face_file(folder / "tokenizer.json", special=_ADDED, split=split)
    contents = json.loads(path.read_text())
    contents["model"] |= model
    if split == _LLAMA3:
        contents["normalizer"] = None
    path.write_text(json.dumps(contents))
    return path


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


# As python -m data_tools.train_tokenizer trains them.
_OURS = {
    "add_dummy_prefix": False,
    "user_defined_symbols": ["\n"],
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "bos_id": -1,
    "eos_id": 1,
}
KINDS = {
    "gpt2 json": Kind("gpt-2", partial(_byte_level, split=None)),
    "qwen2 json": Kind("qwen2", partial(_byte_level, split=_QWEN2)),
    "llama3 json": Kind("llama-bpe", partial(_byte_level, split=_LLAMA3, ignore_merges=True)),
    "merged llama3 json": Kind("smaug-bpe", partial(_byte_level, split=_LLAMA3)),
    "digits json": Kind("smollm", _digits),
    "prefix model": Kind("default", partial(_pieces, add_dummy_prefix=True)),
    "our model": Kind("default", partial(_pieces, **_OURS)),
}
