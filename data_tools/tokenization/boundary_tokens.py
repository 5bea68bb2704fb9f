"""Begin- and end-of-document tokens: as declared with the tokenizer, or else one guess."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from data_tools.errors import DataError
from data_tools.tokenization.special_tokens import SpecialTokens
from data_tools.tokenization.tokenizer_config import TokenizerConfig

_GUESSES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<eod>",
    "<|eos|>",
    "[EOS]",
)


class BoundaryToken(NamedTuple):
    """Tokens that begin or end a document, and the source of that declaration."""

    ids: tuple[int, ...]
    text: str
    source: str

    def __str__(self) -> str:
        return f"{self.text} ({', '.join(map(str, self.ids))}; {self.source})"


class BoundaryTokens(NamedTuple):
    """Begin and end tokens of a tokenizer, and its treatment of special tokens in text."""

    eod: BoundaryToken | None
    no_eod_reason: str
    """Error message for a missing end token, with the remedy."""
    bos: BoundaryToken | None
    adds_bos: bool
    """Whether transformers puts `bos` before plain text."""
    special_tokens: SpecialTokens = "parse"
    """Treatment by transformers of text that spells a special token."""

    @property
    def eod_id(self) -> int | None:
        return None if self.eod is None else self.eod.ids[0]

    def require_eod(self) -> int:
        """Return the end-of-document id.

        Raises:
            DataError: there is none.
        """
        if self.eod is None:
            raise DataError(self.no_eod_reason)
        return self.eod.ids[0]

    def bos_ids(self, add_bos: bool | None) -> tuple[int, ...]:
        """Return the ids that begin a document; with None, those that transformers adds.

        Raises:
            DataError: begin tokens are requested, but none are declared.
        """
        wanted = self.adds_bos if add_bos is None else add_bos
        if not wanted:
            return ()
        if self.bos is None:
            raise DataError(
                "--add-bos: no file of the tokenizer declares a token that begins a text; remove "
                "--add-bos"
            )
        return self.bos.ids


class Vocabulary(Protocol):
    """Token lookup by text and id."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    def token_to_id(self, token: str) -> int | None: ...

    def id_to_token(self, token: int) -> str | None: ...

    def is_special(self, token: int) -> bool: ...


class FoundEod(NamedTuple):
    """End-of-document token, or the reason why there is none."""

    token: BoundaryToken | None
    no_eod_reason: str = ""


def find_eod(
    vocabulary: Vocabulary,
    declared: TokenizerConfig | None,
    *,
    eod: str | int | None,
    own: BoundaryToken | None,
) -> FoundEod:
    """Find the end-of-document token of a tokenizer.

    In order of precedence: the requested `eod`; the declaration of the files beside the tokenizer;
    `own`, that of the tokenizer's own file; the only usual name in the vocabulary.

    Raises:
        DataError: the requested token is not in the vocabulary.
    """
    if eod is not None:
        return FoundEod(_requested_eod(vocabulary, eod))
    token = None if declared is None else _declared_eod(vocabulary, declared)
    token = token or own
    return FoundEod(token) if token is not None else _guess_eod(vocabulary)


def _declared_eod(vocabulary: Vocabulary, declared: TokenizerConfig) -> BoundaryToken | None:
    if (named := declared.named.get("eos_token")) is not None:
        token = vocabulary.token_to_id(named.token.content)
        if token is not None:
            return BoundaryToken((token,), named.token.content, f"declared in {named.file}")
    for eos in declared.eos_ids:
        # Model files are often saved with the default id of another tokenizer.
        if eos.id < vocabulary.vocab_size and vocabulary.is_special(eos.id):
            text = vocabulary.id_to_token(eos.id) or ""
            return BoundaryToken((eos.id,), text, f"declared in {eos.file}")
    return None


def _requested_eod(vocabulary: Vocabulary, eod: str | int) -> BoundaryToken:
    if isinstance(eod, int):
        text = vocabulary.id_to_token(eod) if 0 <= eod < vocabulary.vocab_size else None
        if text is None:
            raise DataError(
                f"{vocabulary.name}: id {eod} is to end a document, but its ids are below "
                f"{vocabulary.vocab_size}; pass the tokenizer of the data, or another end token"
            )
        return BoundaryToken((eod,), text, "as requested")
    token = vocabulary.token_to_id(eod)
    if token is None:
        raise DataError(
            f"{vocabulary.name}: {eod} is not in its vocabulary, so it cannot end a document; "
            "pass --eod TOKEN with a token that is"
        )
    ordinary = "" if vocabulary.is_special(token) else ", which also occurs in ordinary text"
    return BoundaryToken((token,), eod, f"as requested{ordinary}")


def _guess_eod(vocabulary: Vocabulary) -> FoundEod:
    found = {
        name: token for name in _GUESSES if (token := vocabulary.token_to_id(name)) is not None
    }
    special = {name: token for name, token in found.items() if vocabulary.is_special(token)}
    found = special or found
    if len(found) == 1:
        ((text, token),) = found.items()
        return FoundEod(BoundaryToken((token,), text, "a guess: no file declares one"))
    if found:
        reason = f"{' and '.join(found)} are in its vocabulary and no file declares which of them"
    else:
        reason = f"none of {' '.join(_GUESSES)} is in its vocabulary, so no token"
    return FoundEod(
        None,
        f"{vocabulary.name}: {reason} ends a document; name one with --eod TOKEN, or pass "
        "--no-append-eod if documents need none",
    )
