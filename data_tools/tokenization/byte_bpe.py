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

import sys
import unicodedata
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
    spec_of,
    split_pattern,
)
from data_tools.tokenization.special_tokens import Splitter, TokenSpec

# Bits of what is known of a character, 0 before it is compared: split otherwise by the two
# programs; not assigned in Python's Unicode tables, so that its normalization is unknown to them.
_COMPARED, _DIFFERENT, _UNASSIGNED = 1, 2, 4
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
        self._known = np.zeros(sys.maxunicode + 1, dtype=np.uint8)
        ascii_text = "".join(map(chr, range(128)))
        self._all_ascii_equal = not self._known_of(ascii_text) & _DIFFERENT

    @classmethod
    def of(cls, backend: Any, encoder: EncoderName | None = None) -> FastByteBpe | None:
        """Build the fast encoder of a `tokenizers.Tokenizer`, the first that supports it or the one
        that is named; None if there is none."""
        if not _is_byte_bpe(backend):
            return None
        for name in get_args(EncoderName) if encoder is None else (encoder,):
            found = _ENCODERS[name].of(backend)
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
        is_known_equal = self._all_ascii_equal and text.isascii()
        known = 0 if is_known_equal else self._known_of(text)
        if self._normalizer is not None and not text.isascii() and not _is_nfc(text, known):
            text = self._normalizer.normalize_str(text)
            if self._others.occurs_in(text):
                return None
            known = self._known_of(text)
        return None if known & _DIFFERENT or not self.encoder.accepts(text) else text

    def _known_of(self, text: str) -> int:
        """Return the bits of all characters of a text, after comparing new ones."""
        # A table of all characters: a set of those of a text takes as long as to encode it.
        characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        known = self._known[characters]
        if not known.all():
            self._compare(np.unique(characters[known == 0]))
            known = self._known[characters]
        return int(np.bitwise_or.reduce(known))

    def _compare(self, characters: IntArray) -> None:
        texts = [_CONTEXTS.format(chr(character)) for character in characters.tolist()]
        if self._normalizer is not None:
            texts = [self._normalizer.normalize_str(text) for text in texts]
        theirs = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        for character, text, their in zip(characters.tolist(), texts, theirs, strict=True):
            is_equal = self.encoder.encode(text) == their.ids
            is_assigned = unicodedata.category(chr(character)) != "Cn"
            self._known[character] = (
                _COMPARED | _DIFFERENT * (not is_equal) | _UNASSIGNED * (not is_assigned)
            )


def _is_nfc(text: str, known: int) -> bool:
    """Whether normalization leaves a text as it is, for certain.

    Python needs a twentieth of the library's time. The normalization of a character never changes
    once it is assigned (Unicode's stability policy), whatever versions the two have.
    """
    return not known & _UNASSIGNED and unicodedata.is_normalized("NFC", text)


def _is_byte_bpe(backend: Any) -> bool:
    """Whether a tokenizer is byte-level BPE that merges by its list and nothing else."""
    from tokenizers.models import BPE

    model = backend.model
    if not isinstance(model, BPE):
        return False
    # With ignore_merges tokens are looked up instead of merged.
    unusual = (model.byte_fallback, model.ignore_merges, model.dropout, model.unk_token)
    if any((*unusual, model.continuing_subword_prefix, model.end_of_word_suffix)):
        return False
    if spec_of(backend.normalizer) not in (None, {"type": "NFC"}):
        return False
    return split_pattern(spec_of(backend.pre_tokenizer)) is not None and all(
        model.token_to_id(letter) is not None for letter in byte_letters()
    )
