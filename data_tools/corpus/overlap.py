"""Held-out text that is trained on as well: the same corpus, or documents of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from data_tools.arrays import IntArray
from data_tools.corpus.token_stream import NamedStream, Span, TokenStream

_SOUGHT = 64  # documents of a held-out source
_SHORTEST = 64  # tokens: shorter documents may be equal by chance
_COMPARED = 64  # tokens at either end of a document
_BLOCKS = 64
_READ = 64  # documents of a block
# Tokens of a training source whose documents are looked at, all of it or blocks spread over it:
# where an index says where documents begin, and where text is read to find that out.
_INDEXED, _SCANNED = 1 << 32, 1 << 26


def overlap_remarks(train: Sequence[NamedStream], held_out: Sequence[NamedStream]) -> list[str]:
    """A line for each held-out source that is in the training text, whole or in documents.

    Up to 64 documents of 64 tokens or more, spread over a held-out source, are looked for, and
    training documents of the same lengths compared with them at both ends. What is read is bounded:
    of a training source beyond 2^32 tokens (2^26 where blank lines separate documents), or of one
    that has more than 4096 documents of these lengths, a part.
    """
    found = []
    for name, stream in held_out:
        for source, training in train:
            if stream.fingerprint == training.fingerprint:
                found.append(
                    f"data.validation source {name} is the text of data.train source {source} (the "
                    "same fingerprint): its loss says nothing about unseen text; choose other text"
                )
                continue
            sought = {_ends(stream, span): span.end - span.begin for span in _sample(stream)}
            if shared := _shared_documents(training, sought):
                found.append(
                    f"data.validation source {name}: {shared} of {len(sought)} documents that were "
                    f"looked for are in data.train source {source}, too, so that its loss will be "
                    "too low; take them out of one of the two"
                )
    return found


def _sample(stream: TokenStream) -> list[Span]:
    """Documents at places spread over the stream."""
    places = np.unique(np.linspace(0, stream.num_tokens - 1, _SOUGHT).astype(np.int64))
    spans = {stream.document_at(place) for place in places.tolist()}
    return [span for span in spans if span.end - span.begin >= _SHORTEST]


def _ends(stream: TokenStream, span: Span) -> bytes:
    """The first and last tokens of a document."""
    starts = np.array([span.begin, span.end - _COMPARED])
    return stream.read(starts, _COMPARED).astype(np.int64).tobytes()


def _shared_documents(training: TokenStream, sought: Mapping[bytes, int]) -> int:
    """How many of the documents with these ends and lengths are in the training text."""
    lengths = np.array(sorted(set(sought.values())), dtype=np.int64)
    shared = set()
    for span in _documents_of_length(training, lengths):
        ends = _ends(training, span)
        if sought.get(ends) == span.end - span.begin:
            shared.add(ends)
    return len(shared)


def _documents_of_length(stream: TokenStream, lengths: IntArray) -> Iterator[Span]:
    most = _SCANNED if getattr(stream, "is_scanned", False) else _INDEXED
    total = stream.num_tokens
    size = -(-min(total, most) // _BLOCKS)
    for begin in np.unique(np.linspace(0, total - size, _BLOCKS).astype(np.int64)).tolist():
        # Documents that start after a place are looked up, and one may start where a block does.
        (starts,) = stream.document_starts(np.array([max(begin - 1, 0)]), size + min(begin, 1))
        starts = np.unique(starts if begin else np.append(starts, 0))
        if len(starts) == 0:
            continue
        ends = np.append(starts[1:], stream.document_at(int(starts[-1])).end)
        chosen = np.flatnonzero(np.isin(ends - starts, lengths))[:_READ]
        for first, last in zip(starts[chosen].tolist(), ends[chosen].tolist(), strict=True):
            yield Span(first, last)
