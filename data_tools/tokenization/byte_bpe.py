"""Fast path for byte-level BPE (GPT-2, Qwen) through other libraries: the same ids, sooner.

Added tokens and normalization are those of `tokenizers` itself; what is between them is encoded by
gigatoken where it is installed, else by tiktoken.

Merging: see byte_encoders.py. Pre-tokenization: two implementations of a pattern agree if they
classify each character alike (letter, number, space, other). As their Unicode tables differ in
version, each character is compared on first occurrence, in the contexts that the patterns
distinguish. Documents with a character on which they differ fall back to `tokenizers`. That the
programs agree beyond that is tested and not proven, so `preprocess` compares a share of all
documents as it runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from data_tools.arrays import IntArray
from data_tools.tokenization.byte_encoders import (
    EncoderName,
    GigatokenEncoder,
    TextEncoder,
    TiktokenEncoder,
    byte_letters,
    split_pattern,
)
from data_tools.tokenization.special_tokens import Splitter, TokenSpec

# Of a character: not compared yet, split alike by both programs, or not.
_NEW, _EQUAL, _DIFFERENT = 0, 1, 2
_CONTEXTS = (
    "the{0}the {0}the The{0}The 12{0}12 !{0}! {0}{0} '{0} {0}'s '{0}{0} {0} {0}\n\n{0} \n{0}1"
)


_ENCODERS: dict[EncoderName, type[GigatokenEncoder] | type[TiktokenEncoder]] = {
    "gigatoken": GigatokenEncoder,
    "tiktoken": TiktokenEncoder,
}


class FastByteBpe:
    """Fast encoder of a tokenizer.json; `encode` returns None where equality is not certain.

    `encoder`: what encodes ordinary text.
    """

    def __init__(self, backend: Any, encoder: TextEncoder) -> None:
        self._backend, self.encoder = backend, encoder
        self._normalizer = backend.normalizer
        # With `encode_special_tokens` special tokens are not matched but encoded as plain text.
        matched = {
            TokenSpec(*(getattr(token, field) for field in TokenSpec._fields)): number
            for number, token in backend.get_added_tokens_decoder().items()
            if not (token.special and backend.encode_special_tokens)
        }
        self._literal = Splitter({t: n for t, n in matched.items() if t.is_literal})
        self._others = Splitter(
            {TokenSpec(t.content): n for t, n in matched.items() if not t.is_literal}
        )
        self._states = np.zeros(sys.maxunicode + 1, dtype=np.uint8)
        ascii_text = "".join(map(chr, range(128)))
        self._all_ascii_equal = self._is_split_alike(ascii_text)

    @classmethod
    def of(cls, backend: Any, encoder: EncoderName | None = None) -> FastByteBpe | None:
        """Build the fast encoder of a `tokenizers.Tokenizer`, the first that supports it or the one
        that is named; None if there is none."""
        spec = json.loads(backend.to_str())
        if not _is_byte_bpe(spec):
            return None
        for name in get_args(EncoderName) if encoder is None else (encoder,):
            found = _ENCODERS[name].of(backend, spec)
            if found is not None:
                return cls(backend, found)
        return None

    def encode(self, text: str) -> list[int] | None:
        """Return the ids of a text, or None to fall back to `tokenizers`."""
        # Non-literal tokens are searched before and after normalization.
        if self._others.occurs_in(text):
            return None
        ids: list[int] = []
        for part in self._literal.split(text):
            ordinary = None if isinstance(part, int) else self._ordinary(part)
            if ordinary is None and not isinstance(part, int):
                return None
            ids += [part] if isinstance(part, int) else self.encoder.encode(ordinary or "")
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int] | None]:
        """Return what `encode` returns for each text; arrays of ids, where that is faster."""
        found: list[Sequence[int] | None] = [None] * len(texts)
        numbers, ordinary = [], []
        for number, text in enumerate(texts):
            if self._literal.occurs_in(text):
                found[number] = self.encode(text)
            elif not self._others.occurs_in(text) and (part := self._ordinary(text)) is not None:
                numbers.append(number)
                ordinary.append(part)
        for number, ids in zip(numbers, self.encoder.encode_batch(ordinary), strict=True):
            found[number] = ids
        return found

    def _ordinary(self, text: str) -> str | None:
        """Return text without literal tokens as the encoder gets it; None to fall back."""
        if self._normalizer is not None and not text.isascii():
            text = self._normalizer.normalize_str(text)
            if self._others.occurs_in(text):
                return None
        if not self.encoder.accepts(text):
            return None
        if text.isascii() and self._all_ascii_equal:
            return text
        return text if self._is_split_alike(text) else None

    def _is_split_alike(self, text: str) -> bool:
        """Whether both programs agree on every character of a text."""
        # A table of all characters: a set of those of a text takes as long as to encode it.
        characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        states = self._states[characters]
        if (is_new := states == _NEW).any():
            self._compare(np.unique(characters[is_new]))
            states = self._states[characters]
        return not (states == _DIFFERENT).any()

    def _compare(self, characters: IntArray) -> None:
        texts = [_CONTEXTS.format(chr(character)) for character in characters.tolist()]
        if self._normalizer is not None:
            texts = [self._normalizer.normalize_str(text) for text in texts]
        theirs = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        for character, text, their in zip(characters.tolist(), texts, theirs, strict=True):
            is_equal = self.encoder.encode(text) == their.ids
            self._states[character] = _EQUAL if is_equal else _DIFFERENT


def _is_byte_bpe(spec: Any) -> bool:
    """Whether a tokenizer.json is byte-level BPE that merges by its list and nothing else."""
    # With ignore_merges tokens are looked up instead of merged.
    model, affixes = spec["model"], ("continuing_subword_prefix", "end_of_word_suffix")
    unusual = ("ignore_merges", "dropout", "unk_token", *affixes)
    if model["type"] != "BPE" or model["byte_fallback"] or any(map(model.get, unusual)):
        return False
    if spec["normalizer"] not in (None, {"type": "NFC"}):
        return False
    return split_pattern(spec["pre_tokenizer"]) is not None and all(
        letter in model["vocab"] for letter in byte_letters()
    )
