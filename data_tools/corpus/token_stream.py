"""What every source of tokens offers."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from data_tools.arrays import IntArray, TokenArray


class Span(NamedTuple):
    """Places [begin, end) of a stream."""

    begin: int
    end: int


class TokenStream(Protocol):
    """One flat sequence of token ids with document boundaries; the contract of every source."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_bytes(self) -> int | None:
        """Bytes of text behind the tokens; None when unknown."""

    @property
    def fingerprint(self) -> str:
        """Differs between any two corpora."""

    @property
    def document_end(self) -> int | None:
        """The id that every document ends with and that is nowhere else; None: there may be none.

        With one, boundaries are seen in the ids; without, `document_starts` looks them up.
        """

    @property
    def eod_id(self) -> int | None:
        """The id that documents end with, where they do; None: unknown or there is none."""

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """The ids that documents begin with, where they are known to."""

    def read(self, starts: IntArray, length: int) -> TokenArray:
        """Ids of the spans [start, start + length), [n, length] in the dtype of the file."""

    def document_starts(self, begins: IntArray, length: int) -> list[IntArray]:
        """For each begin, where documents start: positions p, begin < p < begin + length."""

    def document_at(self, place: int) -> Span:
        """The document, with the id that ends it, that the token at a place belongs to."""


class NamedStream(NamedTuple):
    """A stream under the name that configuration and ledger use for it."""

    name: str
    stream: TokenStream
