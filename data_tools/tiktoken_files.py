"""Files of tiktoken ranks: a token in base64 and its rank on every line.

Such a file says neither how text is split before it is encoded nor which ids are special. RULES
holds both for the published ones.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data_tools.byte_bpe import GPT2_PATTERN, LONG_SPACE
from data_tools.errors import DataError


class Rules(NamedTuple):
    """What a file of ranks leaves open."""

    pattern: str
    num_ranks: int
    eod: str
    eod_id: int
    vocab_size: int


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_LONGEST_PART = 25_000  # characters
_END = "<|endoftext|>"

# Sources: tiktoken_ext/openai_public.py, Qwen's tokenization_qwen.py, llama_models' tokenizer.py.
RULES = {
    "gpt2": Rules(GPT2_PATTERN, 50_256, _END, 50_256, 50_257),
    "cl100k_base": Rules(_WORDS + r"\p{N}{1,3}" + _REST, 100_256, _END, 100_257, 100_277),
    "o200k_base": Rules(_O200K, 199_998, _END, 199_999, 200_019),
    "qwen": Rules(_WORDS + r"\p{N}" + _REST, 151_643, _END, 151_643, 151_851),
    "llama3": Rules(_WORDS + r"\p{N}{1,3}" + _REST, 128_000, "<|end_of_text|>", 128_001, 128_256),
}


class TiktokenTokenizer:
    """A file of ranks, through the `tiktoken` library.

    Raises:
        DataError: the file cannot be read, or is not the one that the rules are for.
    """

    def __init__(self, path: Path, name: str) -> None:
        import tiktoken

        rules = RULES[name]
        data = _read(path)
        # Other rules give other ids from the same file.
        self.fingerprint = hashlib.sha256(data + f"\n{name}".encode()).hexdigest()
        ranks = _parse(path, data)
        if sorted(ranks.values()) != list(range(rules.num_ranks)):
            raise DataError(
                f"{path}: {len(ranks)} ranks up to {max(ranks.values(), default=-1)} found, "
                f"0 to {rules.num_ranks - 1} expected by {name}; give the rules of this file"
            )
        self._backend = tiktoken.Encoding(
            name,
            pat_str=rules.pattern,
            mergeable_ranks=ranks,
            special_tokens={rules.eod: rules.eod_id},
        )
        self.vocab_size = rules.vocab_size
        self.eod_id = rules.eod_id

    def encode(self, text: str) -> list[int]:
        if not LONG_SPACE.search(text):
            return self._backend.encode_ordinary(text)
        # Cut as Llama 3's own code cuts long runs: on the whole, tiktoken could overflow its stack.
        parts = (text[i : i + _LONGEST_PART] for i in range(0, len(text), _LONGEST_PART))
        return [token for part in parts for token in self._backend.encode_ordinary(part)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids if i != self.eod_id])


def split_spec(spec: str) -> tuple[Path, str] | None:
    """File and rules of FILE:RULES; None for another specification."""
    path, _, name = spec.rpartition(":")
    return (Path(path), name) if path and name in RULES else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer {path}: {error.strerror}; check the path") from error


def _parse(path: Path, data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(
                f"{path}:{number}: a token in base64 and its rank expected; give a file of "
                "tiktoken ranks"
            ) from error
    return ranks
