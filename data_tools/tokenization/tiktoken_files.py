"""Files of tiktoken ranks: a token in base64 and its rank on every line.

Such a file says neither how text is split before it is encoded nor which ids are special. RULES
holds both for the published ones: special tokens that a text may spell and `fim` may name.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data_tools.errors import DataError
from data_tools.tokenization.byte_bpe import GPT2_PATTERN, LONG_SPACE, QWEN2_PATTERN
from data_tools.tokenization.document_marks import Mark, Marks, find_end
from data_tools.tokenization.special_tokens import SpecialTokens, Splitter, TokenSpec


class Rules(NamedTuple):
    """What a file of ranks leaves open."""

    pattern: str
    num_ranks: int
    eod: str
    vocab_size: int
    special: dict[str, int]
    bos: str | None = None
    """What the published tokenizer of transformers puts before a text."""


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
    "gpt2": Rules(GPT2_PATTERN, 50_256, _END, 50_257, {_END: 50_256}),
    "cl100k_base": Rules(
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
    "o200k_base": Rules(
        _O200K, 199_998, _END, 200_019, {_END: 199_999, "<|endofprompt|>": 200_018}
    ),
    "qwen": Rules(
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
    # Versions 3 and 3.1 have other names for some of the reserved ids; these are 3.1's.
    "llama3": Rules(
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
    """A file of ranks, through the `tiktoken` library.

    Raises:
        DataError: the file cannot be read, is not the one that the rules are for, or `eod` is not
            in the vocabulary.
    """

    def __init__(
        self,
        path: Path,
        rules_name: str,
        *,
        eod: str | int | None = None,
        special_tokens: SpecialTokens | None = None,
    ) -> None:
        import tiktoken

        rules = RULES[rules_name]
        data = _read(path)
        self.name = f"{path}:{rules_name}"
        # Other rules give other ids from the same file.
        self.fingerprint = hashlib.sha256(data + f"\n{rules_name}".encode()).hexdigest()
        ranks = _parse(path, data)
        if sorted(ranks.values()) != list(range(rules.num_ranks)):
            raise DataError(
                f"{path}: {len(ranks)} ranks up to {max(ranks.values(), default=-1)} found, "
                f"0 to {rules.num_ranks - 1} expected by {rules_name}; give the rules of this file"
            )
        self._backend = tiktoken.Encoding(
            rules_name,
            pat_str=rules.pattern,
            mergeable_ranks=ranks,
            special_tokens=rules.special,
        )
        self.vocab_size = rules.vocab_size
        self._num_ranks = rules.num_ranks
        self._special = rules.special
        self._names = {number: token for token, number in rules.special.items()}
        is_plain = special_tokens == "plain"
        self._splitter = Splitter(
            {} if is_plain else {TokenSpec(token): n for token, n in rules.special.items()}
        )
        self.marks = self._find_marks(rules, eod)

    @property
    def eod_id(self) -> int | None:
        return self.marks.eod_id

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
        """Text of ids; those that the tokenizer lacks are left out."""
        left_out = self._names if skip_special_tokens else ()
        known = (i for i in ids if i < self._num_ranks or i in self._names)
        return self._backend.decode([int(i) for i in known if i not in left_out])

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
        # Cut as Llama 3's own code cuts long runs: on the whole, tiktoken could overflow its stack.
        parts = (text[i : i + _LONGEST_PART] for i in range(0, len(text), _LONGEST_PART))
        return [token for part in parts for token in self._backend.encode_ordinary(part)]

    def _find_marks(self, rules: Rules, eod: str | int | None) -> Marks:
        source = "as its rules say"
        own = Mark((rules.special[rules.eod],), rules.eod, source)
        # What lies beside a file of ranks is not known to be about it: its rules are.
        end = find_end(self, None, eod=eod, own=own)
        begin = None if rules.bos is None else Mark((rules.special[rules.bos],), rules.bos, source)
        return Marks(end.mark, end.reason, begin, begins_documents=begin is not None)


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
