"""Provenance of a corpus: its sidecar or, without one, `--tokenizer` and `--eod`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.corpus.corpus_info import CorpusInfo, TextRules
from data_tools.corpus.indexed import IndexedDataset
from data_tools.errors import DataError
from data_tools.progress import ReportProgress
from data_tools.tokenization.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer


class Origin(NamedTuple):
    """Tokenizer, encoding rules and license of a corpus."""

    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    text: TextRules
    license: str | None = None


def origin_of(
    dataset: IndexedDataset, *, tokenizer: str | None, eod: str | None = None
) -> Origin | None:
    """Return the origin of a corpus; None if it has no sidecar and no tokenizer is given.

    Raises:
        DataError: `tokenizer` is not the corpus's, or `eod` has no effect.
    """
    info = dataset.info
    if eod is not None and (info is not None or tokenizer is None):
        remedy = "give --tokenizer as well" if info is None else "remove it"
        has = "no tokenizer" if info is None else f"the end token {info.eod_id}"
        raise DataError(f"--eod {eod} has no effect: {dataset.prefix} has {has}; {remedy}")
    if info is not None:
        if tokenizer is not None:
            find_tokenizer(dataset, tokenizer)
        return Origin(
            info.tokenizer,
            info.tokenizer_fingerprint,
            info.vocab_size,
            info.text_rules,
            info.licence,
        )
    if tokenizer is None:
        return None
    loaded = find_tokenizer(dataset, tokenizer, eod=eod)
    assert loaded is not None, "a tokenizer is given"
    text = _text_rules(dataset, loaded, must_end=eod is not None)
    return Origin(tokenizer, loaded.fingerprint, loaded.vocab_size, text)


def find_tokenizer(
    dataset: IndexedDataset, spec: str | None, *, eod: str | None = None
) -> Tokenizer | None:
    """Load the tokenizer `spec`, or else the one recorded in the corpus; None if unavailable.

    Raises:
        DataError: `spec` is not the tokenizer of the corpus.
    """
    info = dataset.info
    if spec is None:
        return None if info is None else recorded_tokenizer(info)
    tokenizer = load_tokenizer(spec, eod=eod)
    if info is not None and tokenizer.fingerprint != info.tokenizer_fingerprint:
        raise DataError(
            f"--tokenizer {spec} ({tokenizer.fingerprint[:12]}) is not the tokenizer of "
            f"{dataset.prefix} ({info.tokenizer_fingerprint[:12]}); pass {info.tokenizer}"
        )
    return tokenizer


def recorded_tokenizer(info: CorpusInfo) -> Tokenizer | None:
    """Load the tokenizer that a sidecar records; None if it is missing or has changed."""
    try:
        tokenizer = load_tokenizer(info.tokenizer)
    except DataError:
        return None
    return tokenizer if tokenizer.fingerprint == info.tokenizer_fingerprint else None


def require_tokenizer(dataset: IndexedDataset, spec: str | None) -> Tokenizer:
    """Return the tokenizer that decodes a corpus.

    Raises:
        DataError: it is not available.
    """
    tokenizer = find_tokenizer(dataset, spec)
    if tokenizer is None:
        named = "" if dataset.info is None else f"{dataset.info.tokenizer} "
        raise DataError(
            f"{dataset.prefix}: its tokenizer {named}is missing or has changed, so the bytes of "
            "its text cannot be counted; pass --tokenizer SPEC"
        )
    return tokenizer


def count_text_bytes(
    dataset: IndexedDataset, tokenizer: Tokenizer, text: TextRules, report: ReportProgress
) -> int:
    """Count the UTF-8 bytes of the text of a corpus by decoding it."""
    count = documents = done = 0
    for chunk in dataset.chunks():
        for ids in np.split(chunk.ids, np.cumsum(chunk.lengths)[:-1]):
            count += num_text_bytes(tokenizer, ids, text)
        documents += len(chunk.lengths)
        done += chunk.ids.nbytes
        report(documents, done)
    return count


def num_text_bytes(tokenizer: Tokenizer, ids: npt.NDArray[Any], rules: TextRules) -> int:
    """Return the UTF-8 bytes of the text of one document, without its begin and end tokens."""
    before = len(rules.bos_ids or ())
    if before and tuple(ids[:before].tolist()) == rules.bos_ids:
        ids = ids[before:]
    if len(ids) and ids[-1] == rules.eod_id:
        ids = ids[:-1]
    if isinstance(tokenizer, ByteTokenizer):
        return len(ids)
    return len(tokenizer.decode(ids.tolist(), skip_special_tokens=False).encode("utf-8"))


def _text_rules(dataset: IndexedDataset, tokenizer: Tokenizer, *, must_end: bool) -> TextRules:
    """Detect which of the tokenizer's begin and end tokens all documents have."""
    ends = dataset.document_ends(0, dataset.num_documents)
    begins = np.concatenate(([0], ends[:-1]))
    eod_id = tokenizer.eod_id
    without = np.flatnonzero(dataset.tokens[ends - 1] != eod_id)
    if must_end and len(without):
        raise DataError(
            f"{dataset.prefix}: document {without[0]} does not end with id {eod_id} of --eod; pass "
            "the token that ends all documents, or remove --eod"
        )
    bos = tokenizer.boundary_tokens.bos
    bos_ids: tuple[int, ...] = () if bos is None else bos.ids
    is_long = bool(np.all(ends - begins >= len(bos_ids)))
    if not is_long or any((dataset.tokens[begins + i] != t).any() for i, t in enumerate(bos_ids)):
        bos_ids = ()
    # Unknown, so assume that the writer may have parsed special tokens.
    return TextRules(None if len(without) else eod_id, bos_ids, "parse")
