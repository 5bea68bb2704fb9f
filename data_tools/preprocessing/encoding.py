"""Encoding of document batches to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
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
from data_tools.tokenization.hugging_face_files import DifferentIdsError, HuggingFaceTokenizer
from data_tools.tokenization.special_tokens import SpecialTokens
from data_tools.tokenization.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer

VERIFY_SHARE = 0.001


class EncodingSettings(NamedTuple):
    """Tokenizer and encoding rules of a `preprocess` run."""

    tokenizer: str
    eod: str | None
    append_eod: bool
    json_key: str
    skip_bad_lines: bool
    add_bos: bool | None = None
    """None: as transformers does for plain text."""
    special_tokens: SpecialTokens | None = None
    """Treatment of text that spells a special token; None: as transformers does."""
    vocab_size: int | None = None
    """Refuse documents with an id beyond it; None: accept all ids of the tokenizer."""
    max_document_bytes: int | None = MAX_DOCUMENT_BYTES
    """Refuse longer documents; None: no limit but memory."""
    encoder: str | None = None
    """The library that encodes byte-level BPE; None: the fastest with the tokenizer's ids."""
    verify_share: float = VERIFY_SHARE
    """Share of documents whose ids are compared with those of the tokenizer's own library."""

    def load_tokenizer(self) -> Tokenizer:
        """Return the tokenizer, loaded once per process.

        Raises:
            DataError: it cannot be loaded, or `encoder` cannot encode for it.
        """
        return _tokenizer(
            self.tokenizer, self.eod, self.special_tokens, self.encoder, self.verify_share
        )

    def encodes_in_threads(self) -> bool:
        """Whether threads encode side by side: what encodes releases Python's lock meanwhile.

        Raises:
            DataError: see `load_tokenizer`.
        """
        tokenizer = self.load_tokenizer()
        return isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.encoder == "gigatoken"

    def text_rules(self) -> TextRules:
        """Return the encoding rules besides the tokenizer.

        Raises:
            DataError: an end or begin token is required, and the tokenizer declares none.
        """
        tokens = self.load_tokenizer().boundary_tokens
        return TextRules(
            eod_id=tokens.require_eod() if self.append_eod else None,
            bos_ids=tokens.bos_ids(self.add_bos),
            special_tokens=self.special_tokens or tokens.special_tokens,
        )


class EncodedDocuments(NamedTuple):
    """Tokens of the documents of a batch that hold text, and the documents left out."""

    ids: npt.NDArray[Any]
    lengths: IntArray
    num_bytes: int
    num_with_null: int
    left_out: list[tuple[RawDocument, str, str]]
    """Document, kind of problem, and detail."""


def encode_documents(
    documents: Sequence[RawDocument], *, settings: EncodingSettings
) -> EncodedDocuments:
    """Tokenize a batch.

    Raises:
        BadDocumentError: a document is malformed, and bad ones are not skipped.
        DataError: the tokenizer returns an id outside its own vocabulary or `vocab_size`.
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
    try:
        encoded = _encode(tokenizer, texts)
    except DifferentIdsError as error:
        raise DataError(f"{kept[error.number].location}: {error}") from error
    ids, lengths = _join(encoded, settings.text_rules(), _dtype(tokenizer))
    _check_ids(ids, lengths, kept, tokenizer, settings.vocab_size)
    return EncodedDocuments(
        ids=ids,
        lengths=lengths,
        num_bytes=sum(len(t) if t.isascii() else len(t.encode("utf-8")) for t in texts),
        num_with_null=sum("\0" in text for text in texts),
        left_out=left_out,
    )


def _encode(
    tokenizer: Tokenizer, texts: Sequence[str]
) -> Sequence[Sequence[int] | npt.NDArray[Any]]:
    """Return the ids of each text."""
    if isinstance(tokenizer, ByteTokenizer):  # avoids a list of 8 bytes per byte
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]
    return tokenizer.encode_batch(texts)


def _dtype(tokenizer: Tokenizer) -> npt.DTypeLike:
    """Return the dtype of ids before they are checked."""
    # A document of bytes may be as large as memory allows: 2 bytes of each, not 8.
    if isinstance(tokenizer, ByteTokenizer):
        return np.uint16
    return np.uint32 if isinstance(tokenizer, HuggingFaceTokenizer) else np.int64


def _join(
    encoded: Sequence[Sequence[int] | npt.NDArray[Any]], rules: TextRules, dtype: npt.DTypeLike
) -> tuple[npt.NDArray[Any], IntArray]:
    """Return the ids of all texts between their begin and end tokens, and how many each has."""
    before = rules.bos_ids or ()
    after = () if rules.eod_id is None else (rules.eod_id,)
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    lengths += len(before) + len(after)
    joined = np.empty(int(lengths.sum()), dtype=dtype)
    begin = 0
    for ids, length in zip(encoded, lengths.tolist(), strict=True):
        end = begin + length
        joined[begin : begin + len(before)] = before
        joined[begin + len(before) : end - len(after)] = ids
        joined[end - len(after) : end] = after
        begin = end
    return joined, lengths


def _check_ids(
    ids: npt.NDArray[Any],
    lengths: IntArray,
    documents: Sequence[RawDocument],
    tokenizer: Tokenizer,
    vocab_size: int | None,
) -> None:
    limit = min(tokenizer.vocab_size, vocab_size or tokenizer.vocab_size)
    is_unsigned = np.issubdtype(ids.dtype, np.unsignedinteger)
    if len(ids) == 0 or ((is_unsigned or ids.min() >= 0) and ids.max() < limit):
        return
    wrong = int(np.flatnonzero((ids < 0) | (ids >= limit))[0])
    location = documents[int(np.searchsorted(np.cumsum(lengths), wrong, side="right"))].location
    token = int(ids[wrong])
    if 0 <= token < tokenizer.vocab_size:
        raise DataError(
            f"{location}: its text has id {token} ({tokenizer.id_to_token(token)}), but "
            f"--vocab-size is {vocab_size}; raise it and the model's, or remove such documents "
            "from the input"
        )
    raise DataError(
        f"{location}: the tokenizer returns id {token}, outside its vocabulary of "
        f"{tokenizer.vocab_size}; its files do not belong together: download the tokenizer again"
    )


@lru_cache(maxsize=1)
def _tokenizer(
    spec: str,
    eod: str | None,
    special_tokens: SpecialTokens | None,
    encoder: str | None,
    verify_share: float,
) -> Tokenizer:
    tokenizer = load_tokenizer(spec, eod=eod, special_tokens=special_tokens)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.choose_encoder(encoder, verify_share=verify_share)
    elif encoder is not None or verify_share != VERIFY_SHARE:
        given = f"--encoder {encoder}" if encoder is not None else f"--verify-share {verify_share}"
        raise DataError(
            f"{given} has no effect: {spec} found, a tokenizer.json expected, or vocab.json with "
            "merges.txt; remove it"
        )
    return tokenizer
