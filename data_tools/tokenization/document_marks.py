"""What begins and ends a document: what a tokenizer's owner declared, or else one plain guess."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from data_tools.errors import DataError
from data_tools.tokenization.declared import Declared
from data_tools.tokenization.special_tokens import SpecialTokens

_GUESSES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<eod>",
    "<|eos|>",
    "[EOS]",
)


class Mark(NamedTuple):
    """Tokens that begin or end a document, and who says so."""

    ids: tuple[int, ...]
    text: str
    source: str

    def __str__(self) -> str:
        return f"{self.text} ({', '.join(map(str, self.ids))}; {self.source})"


class Marks(NamedTuple):
    """What may begin and end a document in the ids of a tokenizer."""

    end: Mark | None
    no_end: str
    """Why there is no end token, and what to do about it."""
    begin: Mark | None
    begins_documents: bool
    """Whether transformers puts `begin` before a plain text."""
    special_tokens: SpecialTokens = "parse"
    """What transformers does with text that spells a special token."""

    @property
    def eod_id(self) -> int | None:
        return None if self.end is None else self.end.ids[0]

    def require_eod(self) -> int:
        """The id that ends a document.

        Raises:
            DataError: there is none.
        """
        if self.end is None:
            raise DataError(self.no_end)
        return self.end.ids[0]

    def begin_ids(self, add_bos: bool | None) -> tuple[int, ...]:
        """The ids that begin a document; with None, those that transformers puts there.

        Raises:
            DataError: some are asked for and there are none.
        """
        wanted = self.begins_documents if add_bos is None else add_bos
        if not wanted:
            return ()
        if self.begin is None:
            raise DataError(
                "--add-bos: no file of the tokenizer declares a token that begins a text; leave it "
                "out"
            )
        return self.begin.ids


class Vocabulary(Protocol):
    """Tokens of a tokenizer by name and id."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    def token_to_id(self, token: str) -> int | None: ...

    def id_to_token(self, token: int) -> str | None: ...

    def is_special(self, token: int) -> bool: ...


class End(NamedTuple):
    """The end token, or why there is none."""

    mark: Mark | None
    reason: str = ""


def find_end(
    vocabulary: Vocabulary, declared: Declared | None, *, eod: str | int | None, own: Mark | None
) -> End:
    """The token that ends a document.

    What is asked for with `eod`; else what the files beside the tokenizer declare; else `own`, what
    its own file says; else the one usual name that it has.

    Raises:
        DataError: the token that is asked for is not in the vocabulary.
    """
    if eod is not None:
        return End(_asked_for(vocabulary, eod))
    declared_mark = None if declared is None else _declared_end(vocabulary, declared)
    mark = declared_mark or own
    return End(mark) if mark is not None else _guess(vocabulary)


def _declared_end(vocabulary: Vocabulary, declared: Declared) -> Mark | None:
    if (role := declared.named.get("eos_token")) is not None:
        token = vocabulary.token_to_id(role.token.content)
        if token is not None:
            return Mark((token,), role.token.content, f"declared in {role.file}")
    for end in declared.ends:
        # Files of models are often saved with the default id of another tokenizer.
        if end.id < vocabulary.vocab_size and vocabulary.is_special(end.id):
            text = vocabulary.id_to_token(end.id) or ""
            return Mark((end.id,), text, f"declared in {end.file}")
    return None


def _asked_for(vocabulary: Vocabulary, eod: str | int) -> Mark:
    if isinstance(eod, int):
        text = vocabulary.id_to_token(eod) if 0 <= eod < vocabulary.vocab_size else None
        if text is None:
            raise DataError(
                f"{vocabulary.name}: id {eod} is to end a document, but its ids are below "
                f"{vocabulary.vocab_size}; give the tokenizer of the data, or another end token"
            )
        return Mark((eod,), text, "as asked for")
    token = vocabulary.token_to_id(eod)
    if token is None:
        raise DataError(
            f"{vocabulary.name}: {eod} is not in its vocabulary, so it cannot end a document; "
            "name one with --eod TOKEN that is"
        )
    ordinary = "" if vocabulary.is_special(token) else ", a token of ordinary text too"
    return Mark((token,), eod, f"as asked for{ordinary}")


def _guess(vocabulary: Vocabulary) -> End:
    found = {
        name: token for name in _GUESSES if (token := vocabulary.token_to_id(name)) is not None
    }
    special = {name: token for name, token in found.items() if vocabulary.is_special(token)}
    found = special or found
    if len(found) == 1:
        ((text, token),) = found.items()
        return End(Mark((token,), text, "a guess: no file declares one"))
    if found:
        reason = f"{' and '.join(found)} are in its vocabulary and no file declares which of them"
    else:
        reason = f"none of {' '.join(_GUESSES)} is in its vocabulary, so no token"
    return End(
        None,
        f"{vocabulary.name}: {reason} ends a document; name one with --eod TOKEN, or pass "
        "--no-append-eod where documents need none",
    )
