"""tiktoken rank files: a base64 token and its rank on every line.

A rank file records neither the pre-tokenization pattern nor the special tokens. ENCODINGS holds
both for the published files: special tokens that text may spell and `data.fim` may name.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data_tools.errors import DataError
from data_tools.tokenization.boundary_tokens import BoundaryToken, BoundaryTokens, find_eod
from data_tools.tokenization.byte_encoders import GPT2_PATTERN, LONG_SPACE, QWEN2_PATTERN
from data_tools.tokenization.special_tokens import SpecialTokens, Splitter, TokenSpec


class TiktokenEncoding(NamedTuple):
    """Pre-tokenization pattern, sizes and special tokens of a published rank file."""

    pattern: str
    num_ranks: int
    eod: str
    vocab_size: int
    special: dict[str, int]
    bos: str | None = None
    """Token that the published transformers tokenizer puts before a text."""


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
ENCODINGS = {
    "gpt2": TiktokenEncoding(GPT2_PATTERN, 50_256, _END, 50_257, {_END: 50_256}),
    "cl100k_base": TiktokenEncoding(
        _WORDS + r"\p{N}{1,3}" + _REST,
        100_256,
        _END,
        100_277,
        {
            _END: 100_257,
            "<|fim_prefix|>": 100_258,
            "<|fim_middle|>": 100_259,
            "<|fim_suffix|>": 100_260,
            "<|endofprompt|>": 100_276,
        },
    ),
    "o200k_base": TiktokenEncoding(
        _O200K, 199_998, _END, 200_019, {_END: 199_999, "<|endofprompt|>": 200_018}
    ),
    "qwen": TiktokenEncoding(
        QWEN2_PATTERN,
        151_643,
        _END,
        151_851,
        {
            _END: 151_643,
            "<|im_start|>": 151_644,
            "<|im_end|>": 151_645,
            **{f"<|extra_{number}|>": 151_646 + number for number in range(205)},
        },
    ),
    # Llama 3 and 3.1 name some of the reserved ids differently; these names are 3.1's.
    "llama3": TiktokenEncoding(
        _WORDS + r"\p{N}{1,3}" + _REST,
        128_000,
        "<|end_of_text|>",
        128_256,
        {
            "<|begin_of_text|>": 128_000,
            "<|end_of_text|>": 128_001,
            "<|finetune_right_pad_id|>": 128_004,
            "<|start_header_id|>": 128_006,
            "<|end_header_id|>": 128_007,
            "<|eom_id|>": 128_008,
            "<|eot_id|>": 128_009,
            "<|python_tag|>": 128_010,
        },
        bos="<|begin_of_text|>",
    ),
}


class TiktokenTokenizer:
    """Tokenizer from a rank file, through the `tiktoken` library.

    Raises:
        DataError: the file cannot be read, does not fit the encoding, or `eod` is not in the
            vocabulary.
    """

    def __init__(
        self,
        path: Path,
        encoding_name: str,
        *,
        eod: str | int | None = None,
        special_tokens: SpecialTokens | None = None,
    ) -> None:
        import tiktoken

        encoding = ENCODINGS[encoding_name]
        data = _read(path)
        self.name = f"{path}:{encoding_name}"
        # The same file gives other ids with another encoding.
        self.fingerprint = hashlib.sha256(data + f"\n{encoding_name}".encode()).hexdigest()
        ranks = _parse(path, data)
        if sorted(ranks.values()) != list(range(encoding.num_ranks)):
            raise DataError(
                f"{path}: {len(ranks)} ranks up to {max(ranks.values(), default=-1)} found, "
                f"0 to {encoding.num_ranks - 1} expected by {encoding_name}; pass the encoding of "
                "this file"
            )
        self._backend = tiktoken.Encoding(
            encoding_name,
            pat_str=encoding.pattern,
            mergeable_ranks=ranks,
            special_tokens=encoding.special,
        )
        self.vocab_size = encoding.vocab_size
        self._num_ranks = encoding.num_ranks
        self._special = encoding.special
        self._names = {number: token for token, number in encoding.special.items()}
        is_plain = special_tokens == "plain"
        self._splitter = Splitter(
            {} if is_plain else {TokenSpec(token): n for token, n in encoding.special.items()}
        )
        self.boundary_tokens = self._find_boundary_tokens(encoding, eod)

    @property
    def eod_id(self) -> int | None:
        return self.boundary_tokens.eod_id

    def encode(self, text: str) -> list[int]:
        if not self._splitter.occurs_in(text):
            return self._encode_ordinary(text)
        ids: list[int] = []
        for part in self._splitter.split(text):
            ids += [part] if isinstance(part, int) else self._encode_ordinary(part)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode ids; ids outside the vocabulary are skipped."""
        skipped = self._names if skip_special_tokens else ()
        known = (i for i in ids if i < self._num_ranks or i in self._names)
        return self._backend.decode([int(i) for i in known if i not in skipped])

    def token_to_id(self, token: str) -> int | None:
        if token in self._special:
            return self._special[token]
        try:
            return self._backend.encode_single_token(token)
        except KeyError:
            return None

    def id_to_token(self, token: int) -> str | None:
        try:
            return self._backend.decode_single_token_bytes(token).decode("utf-8", errors="replace")
        except KeyError:
            return None

    def is_special(self, token: int) -> bool:
        return token in self._names

    def _encode_ordinary(self, text: str) -> list[int]:
        if not LONG_SPACE.search(text):
            return self._backend.encode_ordinary(text)
        # Split long runs as Llama 3's own code does: on the whole text tiktoken's stack may
        # overflow.
        parts = (text[i : i + _LONGEST_PART] for i in range(0, len(text), _LONGEST_PART))
        return [token for part in parts for token in self._backend.encode_ordinary(part)]

    def _find_boundary_tokens(
        self, encoding: TiktokenEncoding, eod: str | int | None
    ) -> BoundaryTokens:
        source = "from its encoding"
        own = BoundaryToken((encoding.special[encoding.eod],), encoding.eod, source)
        # Files beside a rank file may belong to another tokenizer; only its encoding counts.
        found = find_eod(self, None, eod=eod, own=own)
        bos = None
        if encoding.bos is not None:
            bos = BoundaryToken((encoding.special[encoding.bos],), encoding.bos, source)
        return BoundaryTokens(found.token, found.no_eod_reason, bos, adds_bos=bos is not None)


def split_tiktoken_spec(spec: str) -> tuple[Path, str] | None:
    """Split FILE:ENCODING into file and encoding name; None for other specifications."""
    path, _, name = spec.rpartition(":")
    return (Path(path), name) if path and name in ENCODINGS else None


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
                f"{path}:{number}: a token in base64 and its rank expected; pass a tiktoken rank "
                "file"
            ) from error
    return ranks
