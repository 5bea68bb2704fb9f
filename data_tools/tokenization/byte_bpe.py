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
import re
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from data_tools.tokenization.byte_encoders import (
    EncoderName,
    GigatokenEncoder,
    TextEncoder,
    TiktokenEncoder,
    byte_letters,
    split_pattern,
)
from data_tools.tokenization.special_tokens import Splitter, TokenSpec

_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
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
        self._equal: set[str] = set()
        self._different: set[str] = set()
        self._compare(map(chr, range(128)))

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
        characters = {*_NOT_ASCII.findall(text)} if not text.isascii() else set()
        self._compare(characters - self._equal - self._different)
        if self._different and not self._different.isdisjoint(text):
            return None
        return text

    def _compare(self, characters: Iterable[str]) -> None:
        for character in characters:
            text = _CONTEXTS.format(character)
            if self._normalizer is not None:
                text = self._normalizer.normalize_str(text)
            ours = self.encoder.encode(text)
            theirs = self._backend.encode(text, add_special_tokens=False).ids
            (self._equal if ours == theirs else self._different).add(character)


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
