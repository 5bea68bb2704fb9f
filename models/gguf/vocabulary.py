"""Vocabularies as llama.cpp holds them; what is common to their kinds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import NamedTuple

INSTEAD = "pass --no-tokenizer to export the model without it"


class TokenType(IntEnum):
    """As in SentencePiece. Only user-defined tokens are found in plain text as a whole."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Tokens that llama.cpp knows by their texts and makes control tokens, whatever the file says.
_CONTROL_TEXTS = """
<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|>
</s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <|fim_prefix|>
<fim-prefix> <fim_prefix> <PRE> <|code_prefix|> <|prefix|> <|fim_suffix|> <fim-suffix> <fim_suffix>
<SUF> <|code_suffix|> <|suffix|> <|fim_middle|> <fim-middle> <fim_middle> <MID> <|code_middle|>
<|middle|> <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO>
<reponame> <|file_sep|>
"""


class Token(NamedTuple):
    """One id: its text, type and score (of SentencePiece, which merges the highest first)."""

    text: str
    type: TokenType = TokenType.NORMAL
    score: float = 0.0


class Vocabulary(NamedTuple):
    """`kind`: `gpt2` (byte-level BPE) or `llama` (SentencePiece). `pre`: how text is split.

    `tokens`: of the ids 0, 1, ... `merges`: of `gpt2`, best first. `prefix`: of `llama`, whether a
    text gets a space in front. `remarks`: for the user.
    """

    kind: str
    tokens: list[Token]
    pre: str = "default"
    merges: tuple[str, ...] = ()
    prefix: bool = False
    unknown: int | None = None
    remarks: tuple[str, ...] = ()


def filled(known: Mapping[int, Token], size: int, *, source: str) -> list[Token]:
    """The tokens of a model with `size` ids: those that the tokenizer lacks are unused, and of
    those that the model lacks only control tokens are left out, which plain text never becomes.

    Raises:
        ValueError: text can have a token that the model lacks, or two tokens have one text.
    """
    for number, token in sorted(known.items()):
        if number >= size and token.type != TokenType.CONTROL:
            raise ValueError(
                f"tokenizer {source} gives text the id {number} ({token.text!r}), the model has "
                f"vocab_size={size}; give the tokenizer of its data with --tokenizer, or {INSTEAD}"
            )
    unused = TokenType.UNUSED
    tokens = [known.get(i) or Token(f"[UNUSED_{i}]", unused) for i in range(size)]
    texts: dict[str, int] = {}
    for number, token in enumerate(tokens):
        if (other := texts.setdefault(token.text, number)) != number:
            raise ValueError(
                f"tokenizer {source} has ids {other} and {number} of one text {token.text!r}, "
                f"which llama.cpp does not load; {INSTEAD}"
            )
    return tokens


def check_user_defined(texts: Iterable[str], *, source: str) -> list[str]:
    """Check that tokens which are found in plain text are found in it by llama.cpp too; returns
    remarks on those that it takes for special ones.

    It looks for the longest token in the whole text, then for the next: tokens that can overlap
    would be found in another order than from left to right.

    Raises:
        ValueError: they are not.
    """
    found = sorted(set(texts))
    for first in found:
        for second in found:
            if first != second and _can_overlap(first, second):
                raise ValueError(
                    f"tokenizer {source}: the added tokens {first!r} and {second!r} can overlap in "
                    f"a text, where llama.cpp takes the longest and not the first; {INSTEAD}"
                )
    special = [text for text in found if text in _CONTROL_TEXTS.split()]
    if not special:
        return []
    return [
        f"llama.cpp takes {listed(special)} for special, by name: unlike in training, it finds "
        "them only in text whose special tokens it parses"
    ]


def listed(texts: list[str]) -> str:
    """The first few of some texts."""
    return f"{', '.join(texts[:5])}{f' and {len(texts) - 5} more' if len(texts) > 5 else ''}"


def spelt_remark(texts: list[str]) -> list[str]:
    """A remark on special tokens that llama.cpp also makes of plain text."""
    if not texts:
        return []
    return [
        f"llama.cpp also reads plain text that spells {listed(texts)} as the special token; keep "
        "it out of such text"
    ]


def _can_overlap(first: str, second: str) -> bool:
    """Whether an end of the first is a beginning of the second, and neither is in the other there.

    Not in runs of one character, which both ways cut alike.
    """
    if len(set(first + second)) == 1:
        return False
    shorter = min(len(first), len(second))
    return any(first[-n:] == second[:n] for n in range(1, shorter))
