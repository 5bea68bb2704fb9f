"""Documents to token ids, a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.documents import BadDocumentError, RawDocument, extract_text
from data_tools.errors import DataError
from data_tools.permutation import IntArray
from data_tools.tokenizers import Tokenizer, load_tokenizer


class EncodingSettings(NamedTuple):
    """How a document becomes tokens."""

    tokenizer: str
    eod: str | None
    append_eod: bool
    json_key: str
    skip_bad_lines: bool

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded once in a process."""
        return _tokenizer(self.tokenizer, self.eod)


class EncodedDocuments(NamedTuple):
    """The documents of a batch that hold text, as tokens, and what was left out of it."""

    ids: npt.NDArray[np.int64]
    lengths: IntArray
    num_bytes: int
    num_with_null: int
    left_out: list[tuple[RawDocument, str, str]]
    """Document, kind of problem, and its detail."""


def encode_documents(
    documents: Sequence[RawDocument], *, settings: EncodingSettings
) -> EncodedDocuments:
    """Tokenize a batch.

    Raises:
        BadDocumentError: a document is not what its file promises, and bad ones are not skipped.
        DataError: the tokenizer gives an id outside its own vocabulary.
    """
    kept, texts, left_out = [], [], []
    for document in documents:
        try:
            text = extract_text(document, json_key=settings.json_key)
        except BadDocumentError as error:
            if not settings.skip_bad_lines:
                raise
            left_out.append((document, error.problem, error.detail))
            continue
        if text:
            kept.append(document)
            texts.append(text)
        else:
            left_out.append((document, "empty", "no text"))
    tokenizer = settings.load_tokenizer()
    encoded = tokenizer.encode_batch(texts)
    if settings.append_eod:
        for tokens in encoded:
            tokens.append(tokenizer.eod_id)
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    ids = np.fromiter(chain.from_iterable(encoded), dtype=np.int64, count=int(lengths.sum()))
    _check_ids(ids, lengths, kept, tokenizer.vocab_size)
    return EncodedDocuments(
        ids=ids,
        lengths=lengths,
        num_bytes=sum(len(text.encode("utf-8")) for text in texts),
        num_with_null=sum("\0" in text for text in texts),
        left_out=left_out,
    )


def _check_ids(
    ids: IntArray, lengths: IntArray, documents: Sequence[RawDocument], vocab_size: int
) -> None:
    if len(ids) == 0 or (ids.min() >= 0 and ids.max() < vocab_size):
        return
    wrong = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
    document = documents[int(np.searchsorted(np.cumsum(lengths), wrong, side="right"))]
    raise DataError(
        f"{document.place}: the tokenizer gives id {ids[wrong]}, outside its vocabulary of "
        f"{vocab_size}; its files do not belong together: get the tokenizer again"
    )


@lru_cache(maxsize=1)
def _tokenizer(spec: str, eod: str | None) -> Tokenizer:
    return load_tokenizer(spec, eod=eod)
