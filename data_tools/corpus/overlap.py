"""Detection of held-out text in the training text: the same corpus, or shared documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from data_tools.arrays import IntArray
from data_tools.corpus.token_stream import NamedStream, Span, TokenStream

_SAMPLED_DOCUMENTS = 64  # of a held-out source
_MIN_DOCUMENT_TOKENS = 64  # shorter documents may be equal by chance
_COMPARED_TOKENS = 64  # at either end of a document
_BLOCKS = 64
_DOCUMENTS_PER_BLOCK = 64
# Most tokens of a training source that are searched, whole or in blocks spread over it: with
# an index of document starts, and without one, where the text must be scanned for them.
_MAX_INDEXED_TOKENS, _MAX_SCANNED_TOKENS = 1 << 32, 1 << 26


def overlap_warnings(train: Sequence[NamedStream], held_out: Sequence[NamedStream]) -> list[str]:
    """Return a warning for each held-out source found in the training text, whole or in part.

    Up to 64 documents of at least 64 tokens, spread over a held-out source, are searched for:
    training documents of the same lengths are compared with them at both ends. The search is
    bounded: only part of a training source is read if it has more than 2^32 tokens (2^26 if blank
    lines separate documents) or more than 4096 documents of these lengths.
    """
    warnings = []
    for name, stream in held_out:
        for source, training in train:
            if stream.fingerprint == training.fingerprint:
                warnings.append(
                    f"data.validation source {name} is the text of data.train source {source} (the "
                    "same fingerprint): its loss says nothing about unseen text; choose other text"
                )
                continue
            sought = {_ends(stream, span): span.end - span.begin for span in _sample(stream)}
            if shared := _shared_documents(training, sought):
                warnings.append(
                    f"data.validation source {name}: {shared} of {len(sought)} sampled documents "
                    f"are also in data.train source {source}, so that its loss will be too low; "
                    "remove them from one of the two"
                )
    return warnings


def _sample(stream: TokenStream) -> list[Span]:
    """Return documents at evenly spaced positions of the stream."""
    last = stream.num_tokens - 1
    positions = np.unique(np.linspace(0, last, _SAMPLED_DOCUMENTS).astype(np.int64))
    spans = {stream.document_at(position) for position in positions.tolist()}
    return [span for span in spans if span.end - span.begin >= _MIN_DOCUMENT_TOKENS]


def _ends(stream: TokenStream, span: Span) -> bytes:
    """Return the first and last tokens of a document."""
    starts = np.array([span.begin, span.end - _COMPARED_TOKENS])
    return stream.read(starts, _COMPARED_TOKENS).astype(np.int64).tobytes()


def _shared_documents(training: TokenStream, sought: Mapping[bytes, int]) -> int:
    """Count the documents with the given ends and lengths in the training text."""
    lengths = np.array(sorted(set(sought.values())), dtype=np.int64)
    shared = set()
    for span in _documents_of_length(training, lengths):
        ends = _ends(training, span)
        if sought.get(ends) == span.end - span.begin:
            shared.add(ends)
    return len(shared)


def _documents_of_length(stream: TokenStream, lengths: IntArray) -> Iterator[Span]:
    is_scanned = getattr(stream, "is_scanned", False)
    limit = _MAX_SCANNED_TOKENS if is_scanned else _MAX_INDEXED_TOKENS
    total = stream.num_tokens
    size = -(-min(total, limit) // _BLOCKS)
    for begin in np.unique(np.linspace(0, total - size, _BLOCKS).astype(np.int64)).tolist():
        # The lookup excludes its begin, so ask from one earlier: a document may start the block.
        (starts,) = stream.document_starts(np.array([max(begin - 1, 0)]), size + min(begin, 1))
        starts = np.unique(starts if begin else np.append(starts, 0))
        if len(starts) == 0:
            continue
        ends = np.append(starts[1:], stream.document_at(int(starts[-1])).end)
        chosen = np.flatnonzero(np.isin(ends - starts, lengths))[:_DOCUMENTS_PER_BLOCK]
        for first, last in zip(starts[chosen].tolist(), ends[chosen].tolist(), strict=True):
            yield Span(first, last)
