"""Small corpora for tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_tools.corpus_info import CorpusInfo
from data_tools.indexed_writer import IndexedDatasetWriter
from data_tools.permutation import IntArray


def write_corpus(
    prefix: Path,
    documents: Iterable[IntArray],
    *,
    vocab_size: int = 1 << 20,
    tokenizer_fingerprint: str = "t" * 64,
    num_bytes: int = 1000,
) -> CorpusInfo:
    """Write documents of ids as a .bin/.idx corpus."""
    with IndexedDatasetWriter(prefix, vocab_size=vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
        return writer.finish(
            tokenizer="tokenizer.model",
            tokenizer_fingerprint=tokenizer_fingerprint,
            eod_id=None,
            num_bytes=num_bytes,
            command="a test",
        )


def counting_documents(lengths: Iterable[int], *, first: int = 0) -> list[IntArray]:
    """Documents in which every token is its own position in the corpus, plus `first`."""
    documents = []
    for length in lengths:
        documents.append(np.arange(first, first + length))
        first += length
    return documents


def write_counting_corpus(
    prefix: Path, num_tokens: int, *, first: int = 0, vocab_size: int = 1 << 20
) -> Path:
    """A corpus of documents of 1 to 40 tokens, every token its own position plus `first`."""
    generator = np.random.default_rng(num_tokens)
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        lengths.append(min(int(generator.integers(1, 41)), num_tokens - sum(lengths)))
    write_corpus(prefix, counting_documents(lengths, first=first), vocab_size=vocab_size)
    return prefix
