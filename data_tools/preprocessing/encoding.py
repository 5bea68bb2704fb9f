"""Documents to token ids, a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.arrays import IntArray
from data_tools.corpus.corpus_info import TextRules
from data_tools.errors import DataError
from data_tools.preprocessing.documents import (
    MAX_DOCUMENT_BYTES,
    BadDocumentError,
    RawDocument,
    extract_text,
)
from data_tools.tokenization.special_tokens import SpecialTokens
from data_tools.tokenization.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer


class EncodingSettings(NamedTuple):
    """How a document becomes tokens."""

    tokenizer: str
    eod: str | None
    append_eod: bool
    json_key: str
    skip_bad_lines: bool
    add_bos: bool | None = None
    """None: where transformers does it for a plain text."""
    special_tokens: SpecialTokens | None = None
    """None: what transformers does with text that spells a special token."""
    vocab_size: int | None = None
    """Refuse documents that have an id beyond it; None: any id of the tokenizer."""
    max_document_bytes: int | None = MAX_DOCUMENT_BYTES
    """Refuse longer documents; None: as long as memory lasts."""

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded once in a process."""
        return _tokenizer(self.tokenizer, self.eod, self.special_tokens)

    def text_rules(self) -> TextRules:
        """What is done to a text beside encoding it.

        Raises:
            DataError: a document is to have an end or a begin token, and the tokenizer names none.
        """
        marks = self.load_tokenizer().marks
        return TextRules(
            eod_id=marks.require_eod() if self.append_eod else None,
            bos_ids=marks.begin_ids(self.add_bos),
            special_tokens=self.special_tokens or marks.special_tokens,
        )


class EncodedDocuments(NamedTuple):
    """The documents of a batch that hold text, as tokens, and what was left out of it."""

    ids: npt.NDArray[Any]
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
            text = extract_text(
                document,
                json_key=settings.json_key,
                max_bytes=settings.max_document_bytes,
            )
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
    ids, lengths = _with_marks(*_encode(tokenizer, texts), settings.text_rules())
    _check_ids(ids, lengths, kept, tokenizer, settings.vocab_size)
    return EncodedDocuments(
        ids=ids,
        lengths=lengths,
        num_bytes=sum(len(text.encode("utf-8")) for text in texts),
        num_with_null=sum("\0" in text for text in texts),
        left_out=left_out,
    )


def num_text_bytes(tokenizer: Tokenizer, ids: npt.NDArray[Any], rules: TextRules) -> int:
    """UTF-8 bytes of the text of one document."""
    before = len(rules.bos_ids or ())
    if before and tuple(ids[:before].tolist()) == rules.bos_ids:
        ids = ids[before:]
    if len(ids) and ids[-1] == rules.eod_id:
        ids = ids[:-1]
    if isinstance(tokenizer, ByteTokenizer):
        return len(ids)
    return len(tokenizer.decode(ids.tolist(), skip_special_tokens=False).encode("utf-8"))


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[npt.NDArray[Any], IntArray]:
    """Ids of texts one after the other, and how many each has."""
    if isinstance(tokenizer, ByteTokenizer):  # a list would take 8 bytes for each, and time
        data = [text.encode("utf-8") for text in texts]
        lengths = np.fromiter(map(len, data), dtype=np.int64, count=len(data))
        return np.frombuffer(b"".join(data), dtype=np.uint8).astype(np.uint16), lengths
    encoded = tokenizer.encode_batch(texts)
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    flat = chain.from_iterable(encoded)
    return np.fromiter(flat, dtype=np.int64, count=int(lengths.sum())), lengths


def _with_marks(
    ids: npt.NDArray[Any], lengths: IntArray, rules: TextRules
) -> tuple[npt.NDArray[Any], IntArray]:
    """Put what begins and ends a document around each."""
    before = rules.bos_ids or ()
    after = () if rules.eod_id is None else (rules.eod_id,)
    if not before and not after:
        return ids, lengths
    marked = lengths + len(before) + len(after)
    ends = np.cumsum(marked)
    result = np.empty(int(marked.sum()), dtype=ids.dtype)
    is_text = np.ones(len(result), dtype=bool)
    places = [*((ends - marked + i, token) for i, token in enumerate(before))]
    places += [(ends - len(after) + i, token) for i, token in enumerate(after)]
    for where, token in places:
        result[where] = token
        is_text[where] = False
    result[is_text] = ids
    return result, marked


def _check_ids(
    ids: npt.NDArray[Any],
    lengths: IntArray,
    documents: Sequence[RawDocument],
    tokenizer: Tokenizer,
    vocab_size: int | None,
) -> None:
    limit = min(tokenizer.vocab_size, vocab_size or tokenizer.vocab_size)
    if len(ids) == 0 or (ids.min() >= 0 and ids.max() < limit):
        return
    wrong = int(np.flatnonzero((ids < 0) | (ids >= limit))[0])
    place = documents[int(np.searchsorted(np.cumsum(lengths), wrong, side="right"))].place
    token = int(ids[wrong])
    if 0 <= token < tokenizer.vocab_size:
        raise DataError(
            f"{place}: its text has id {token} ({tokenizer.id_to_token(token)}), but --vocab-size "
            f"is {vocab_size}; raise it with the model's, or leave such documents out of the input"
        )
    raise DataError(
        f"{place}: the tokenizer gives id {token}, outside its vocabulary of "
        f"{tokenizer.vocab_size}; its files do not belong together: get the tokenizer again"
    )


@lru_cache(maxsize=1)
def _tokenizer(spec: str, eod: str | None, special_tokens: SpecialTokens | None) -> Tokenizer:
    return load_tokenizer(spec, eod=eod, special_tokens=special_tokens)
