"""The interface of all token sources."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from data_tools.arrays import IntArray, TokenArray


class Span(NamedTuple):
    """Token range [begin, end) of a stream."""

    begin: int
    end: int


class DocumentOrigin(NamedTuple):
    """Location of a document in its corpus and in the input, as far as the corpus records it.

    `document`: its number in the corpus, from 0; None if documents are found by scanning.
    `input`: the file, or the `--input` argument of `preprocess`; None if not recorded.
    `line`: line of that file in which the document begins, from 1; None if not recorded.
    `input_index`: number of the document among those of `input`, from 0; None if not recorded.
    """

    document: int | None = None
    input: str | None = None
    line: int | None = None
    input_index: int | None = None


class TokenStream(Protocol):
    """Flat sequence of token ids with document boundaries."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_bytes(self) -> int | None:
        """Bytes of the text that the tokens encode; None if unknown."""

    @property
    def is_bytes(self) -> bool:
        """Whether ids below 256 are the bytes of the text."""

    @property
    def fingerprint(self) -> str:
        """Content hash that differs between any two corpora."""

    @property
    def document_end(self) -> int | None:
        """The id that ends every document and occurs nowhere else, or None if not guaranteed.

        If set, boundaries can be read off the ids; otherwise use `document_starts`.
        """

    @property
    def eod_id(self) -> int | None:
        """End-of-document id, or None if unknown or absent."""

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """Ids that begin every document, as far as known."""

    def read(self, starts: IntArray, length: int) -> TokenArray:
        """Read the spans [start, start + length): ids [n, length] in the dtype of the file."""

    def document_starts(self, begins: IntArray, length: int) -> list[IntArray]:
        """Return, for each begin, the document starts p with begin < p < begin + length."""

    def document_at(self, position: int) -> Span:
        """Return the span of the document around a token, including its end-of-document id."""

    def origin_at(self, position: int) -> DocumentOrigin:
        """Return the location of the document around a token."""


class NamedStream(NamedTuple):
    """A stream and its name in the configuration and the ledger."""

    name: str
    stream: TokenStream
