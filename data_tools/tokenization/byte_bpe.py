"""Fast path for byte-level BPE (GPT-2, Qwen) through tiktoken: same ids, several times faster.

Merging: `tokenizers` merges the pairs of its list, tiktoken any two neighbours that form a token,
both by rank. They agree if every token, encoded alone, merges to itself: neighbours that make up a
token have then been merged as in that token alone, so they are its own last pair. This is checked.

Pre-tokenization: the two regular expression engines agree if they classify each character alike
(letter, number, space, other). As their Unicode tables differ in version, each character is
compared on first occurrence, in the contexts that the patterns distinguish. Documents with a
character on which they differ fall back to `tokenizers`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from data_tools.tokenization.special_tokens import Splitter, TokenSpec

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
LONG_SPACE = re.compile(r"\s{1000}")
"""Run of spaces; very long ones overflow the stack of tiktoken's regular expressions."""
_CONTEXTS = (
    "the{0}the {0}the The{0}The 12{0}12 !{0}! {0}{0} '{0} {0}'s '{0}{0} {0} {0}\n\n{0} \n{0}1"
)


class FastByteBpe:
    """Fast encoder of a tokenizer.json; `encode` returns None where equality is not certain."""

    def __init__(self, backend: Any, *, pattern: str, ranks: dict[bytes, int]) -> None:
        import tiktoken

        self._backend = backend
        self._normalizer = backend.normalizer
        self._encoding = tiktoken.Encoding(
            "byte_bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
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
    def of(cls, backend: Any) -> FastByteBpe | None:
        """Build the fast encoder of a `tokenizers.Tokenizer`; None if it is not supported."""
        spec = json.loads(backend.to_str())
        pattern = _split_pattern(spec["pre_tokenizer"])
        if pattern is None or spec["normalizer"] not in (None, {"type": "NFC"}):
            return None
        ranks = _ranks(spec["model"])
        if ranks is None or not _merge_to_themselves(backend.model, spec["model"]["merges"], ranks):
            return None
        return cls(backend, pattern=pattern, ranks=ranks)

    def encode(self, text: str) -> list[int] | None:
        """Return the ids of a text, or None to fall back to `tokenizers`."""
        # Non-literal tokens are searched before and after normalization.
        if self._others.occurs_in(text):
            return None
        if not self._literal.occurs_in(text):
            return self._encode_ordinary(text)
        ids: list[int] = []
        for part in self._literal.split(text):
            found = [part] if isinstance(part, int) else self._encode_ordinary(part)
            if found is None:
                return None
            ids += found
        return ids

    def _encode_ordinary(self, text: str) -> list[int] | None:
        if self._normalizer is not None and not text.isascii():
            text = self._normalizer.normalize_str(text)
            if self._others.occurs_in(text):
                return None
        if LONG_SPACE.search(text):
            return None
        characters = {*_NOT_ASCII.findall(text)} if not text.isascii() else set()
        self._compare(characters - self._equal - self._different)
        if self._different and not self._different.isdisjoint(text):
            return None
        return self._encoding.encode_ordinary(text)

    def _compare(self, characters: Iterable[str]) -> None:
        for character in characters:
            text = _CONTEXTS.format(character)
            if self._normalizer is not None:
                text = self._normalizer.normalize_str(text)
            ours = self._encoding.encode_ordinary(text)
            theirs = self._backend.encode(text, add_special_tokens=False).ids
            (self._equal if ours == theirs else self._different).add(character)


def _split_pattern(spec: Any) -> str | None:
    """Return the pre-tokenization pattern; None if it is not supported."""
    if spec is None:
        return None
    steps = spec["pretokenizers"] if spec["type"] == "Sequence" else [spec]
    last = steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"]:
        return GPT2_PATTERN if len(steps) == 1 else None
    if len(steps) != 2 or steps[0]["type"] != "Split" or steps[0]["behavior"] != "Isolated":
        return None
    return None if steps[0]["invert"] else steps[0]["pattern"].get("Regex")


def _ranks(model: Any) -> dict[bytes, int] | None:
    """Map token bytes to ids; None unless ids increase in merge order, as tiktoken requires."""
    # With ignore_merges the check below would look tokens up instead of merging them.
    unusual = (
        "ignore_merges",
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
    )
    if model["type"] != "BPE" or model["byte_fallback"] or any(map(model.get, unusual)):
        return None
    vocab = model["vocab"]
    letters = byte_letters()
    if not all(letter in vocab for letter in letters):
        return None
    ranks = {bytes([byte]): vocab[letter] for letter, byte in letters.items()}
    previous = -1
    for merge in model["merges"]:
        token = "".join(merge)
        rank = vocab.get(token, -1)
        if rank <= previous or not letters.keys() >= set(token):
            return None
        previous = rank
        ranks[bytes(map(letters.__getitem__, token))] = rank
    return ranks if len({*ranks.values()}) == len(ranks) else None


def _merge_to_themselves(model: Any, merges: Any, ranks: dict[bytes, int]) -> bool:
    """Return whether the bytes of each token merge to that token."""
    tokens = [*byte_letters(), *("".join(merge) for merge in merges)]
    return all(
        [found.id for found in model.tokenize(token)] == [rank]
        for token, rank in zip(tokens, ranks.values(), strict=True)
    )


def byte_letters() -> dict[str, int]:
    """Return the printable character for each byte in vocabularies derived from GPT-2's."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}
