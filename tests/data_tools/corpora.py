"""Small corpora for tests."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from data_tools.arrays import IntArray
from data_tools.corpus.corpus_info import CorpusInfo
from data_tools.corpus.indexed_writer import IndexedDatasetWriter
from data_tools.tokenization.special_tokens import SpecialTokens


def write_corpus(
    prefix: Path,
    documents: Iterable[IntArray],
    *,
    vocab_size: int = 1 << 20,
    tokenizer_fingerprint: str = "t" * 64,
    num_bytes: int = 1000,
    eod_id: int | None = None,
    bos_ids: tuple[int, ...] = (),
    special_tokens: SpecialTokens = "plain",
) -> CorpusInfo:
    """Write documents of ids as a .bin/.idx corpus; they hold what ends and begins them."""
    with IndexedDatasetWriter(prefix, vocab_size=vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
        return writer.finish(
            tokenizer="tokenizer.model",
            tokenizer_fingerprint=tokenizer_fingerprint,
            eod_id=eod_id,
            bos_ids=bos_ids,
            special_tokens=special_tokens,
            num_bytes=num_bytes,
            command="a test",
        )


def megatron_datasets(name: str) -> ModuleType:
    """A module of megatron.core.datasets; the import takes seconds, and most tests need none."""
    with warnings.catch_warnings(action="ignore"):  # it misses Transformer Engine and Apex
        return importlib.import_module(f"megatron.core.datasets.{name}")


def write_megatron_corpus(prefix: Path, documents: Iterable[IntArray], *, dtype: str) -> Path:
    """Write documents with Megatron-Core's own writer, which leaves no .json."""
    module = megatron_datasets("indexed_dataset")
    builder = module.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(dtype).type)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


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
