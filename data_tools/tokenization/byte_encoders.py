"""Other libraries' encoders of plain text by byte-level BPE: gigatoken and tiktoken.

gigatoken merges the pairs of the list, as `tokenizers` does. tiktoken merges any two neighbours
that form a token, by rank. That is the same if every token, encoded alone, merges to itself:
neighbours that make up a token have then been merged as in that token alone, so they are its own
last pair. This is checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import orjson

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LONG_SPACE = re.compile(r"\s{1000}")
"""Run of spaces; very long ones overflow the stack of tiktoken's regular expressions."""

EncoderName = Literal["gigatoken", "tiktoken"]


class TextEncoder(Protocol):
    """Another library's encoder of text without added tokens, in which nothing is normalized."""

    name: EncoderName

    def accepts(self, text: str) -> bool:
        """Whether a text can be encoded."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Sequence[int]]: ...


class TiktokenEncoder:
    """tiktoken with the pattern and the merges of a tokenizer.json."""

    name: EncoderName = "tiktoken"

    def __init__(self, pattern: str, ranks: dict[bytes, int]) -> None:
        import tiktoken

        self._encoding = tiktoken.Encoding(
            "byte_bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    @classmethod
    def of(cls, backend: Any) -> TiktokenEncoder | None:
        """Build it for a `tokenizers.Tokenizer`; None if ids would differ."""
        pattern, model = split_pattern(spec_of(backend.pre_tokenizer)), spec_of(backend.model)
        ranks = ranks_of(model)
        if pattern is None or ranks is None:
            return None
        if not _merge_to_themselves(backend.model, model["merges"], ranks):
            return None
        return cls(pattern, ranks)

    def accepts(self, text: str) -> bool:
        return LONG_SPACE.search(text) is None

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        return [self._encoding.encode_ordinary(text) for text in texts]


class GigatokenEncoder:
    """gigatoken with the pattern and the merges of a tokenizer.json."""

    name: EncoderName = "gigatoken"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def of(cls, backend: Any) -> GigatokenEncoder | None:
        """Build it for a `tokenizers.Tokenizer`; None if it is not installed, or does not know the
        pattern."""
        try:
            import gigatoken
        except ImportError:
            return None
        outer = ("normalizer", "post_processor", "decoder", "truncation", "padding")
        plain = dict.fromkeys(outer) | {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": orjson.Fragment(_json_of(backend.pre_tokenizer)),
            "model": orjson.Fragment(_json_of(backend.model)),
        }
        try:
            return cls(gigatoken.Tokenizer.from_json(orjson.dumps(plain)))
        except (RuntimeError, ValueError):
            return None

    def accepts(self, text: str) -> bool:
        return True

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        # Arrays. Its own batches are as fast on one thread, and come as arrays of another library.
        return [self._tokenizer.encode(text) for text in texts]


def spec_of(part: Any) -> Any:
    """Return what a tokenizer.json holds of a part of a `tokenizers.Tokenizer`."""
    return None if part is None else json.loads(_json_of(part))


def _json_of(part: Any) -> bytes:
    # What the library pickles. A vocabulary is large: parsing it takes longer than encoding 10 MB.
    data: bytes = part.__getstate__()
    return data


def split_pattern(spec: Any) -> str | None:
    """Return the pre-tokenization pattern; None if it is not supported."""
    if spec is None:
        return None
    steps = spec["pretokenizers"] if spec["type"] == "Sequence" else [spec]
    if not steps:
        return None
    last = steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"]:
        return GPT2_PATTERN if len(steps) == 1 else None
    if len(steps) != 2 or steps[0]["type"] != "Split" or steps[0]["behavior"] != "Isolated":
        return None
    return None if steps[0]["invert"] else steps[0]["pattern"].get("Regex")


def ranks_of(model: Any) -> dict[bytes, int] | None:
    """Map token bytes to ids; None unless ids increase in merge order, as tiktoken requires."""
    vocab = model["vocab"]
    letters = byte_letters()
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
