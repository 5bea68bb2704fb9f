"""Megatron: PREFIX.bin and PREFIX.idx (`corpus/indexed.py`), with PREFIX.json where we wrote it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.arrays import IntArray
from data_tools.corpus.indexed import IndexedDataset
from data_tools.corpus.indexed_writer import IndexedDatasetWriter, smallest_dtype, vocab_size_of
from data_tools.formats.blocks import (
    Block,
    Boundary,
    ReadOptions,
    Source,
    WriteOptions,
    cut_at_ends,
)
from data_tools.formats.manifest import Manifest
from data_tools.formats.raw_files import raw_file

DTYPES = ("uint8", "uint16", "int32", "int64")
_DOCUMENTS = 1 << 16  # whose ends are read at once


def open_megatron(paths: Sequence[Path], options: ReadOptions) -> list[Source]:
    """Open corpora by their prefixes.

    Raises:
        DataError: a file is missing, truncated or of another format, or the two disagree.
    """
    return [_open(path) for path in paths]


def _open(prefix: Path) -> Source:
    dataset = IndexedDataset(prefix)
    return Source(
        name=str(dataset.paths.bin),
        dtype=dataset.dtype,
        num_bytes=dataset.tokens.nbytes,
        blocks=partial(_blocks, dataset),
        recorded=_recorded(dataset),
    )


def _blocks(dataset: IndexedDataset, boundary: Boundary) -> Iterator[Block]:
    path = dataset.paths.bin
    return cut_at_ends(raw_file(path, dataset.dtype).parts(), _ends(dataset), path)


def _ends(dataset: IndexedDataset) -> Iterator[IntArray]:
    for first in range(0, dataset.num_documents, _DOCUMENTS):
        yield dataset.document_ends(first, min(first + _DOCUMENTS, dataset.num_documents))


def _recorded(dataset: IndexedDataset) -> Manifest | None:
    info = dataset.info
    if info is None:
        return None
    return Manifest(
        kind="megatron",
        dtype=info.dtype,
        num_documents=info.num_documents,
        num_tokens=info.num_tokens,
        ids_sha256=info.bin_sha256,
        ends_sha256=None,
        eod_id=info.eod_id,
        info=info,
    )


class MegatronWriter:
    """Writes OUTPUT.bin and OUTPUT.idx, and OUTPUT.json if the corpus once had one.

    Raises:
        DataError: one exists and `overwrite` is false.
    """

    def __init__(self, output: Path, dtype: np.dtype[Any], options: WriteOptions) -> None:
        self._writer = IndexedDatasetWriter(
            output,
            vocab_size=vocab_size_of(dtype),
            overwrite=options.overwrite,
            with_info=options.info is not None,
        )

    def add(self, block: Block) -> None:
        self._writer.add_block(block.ids, block.ends)

    def finish(self, manifest: Manifest) -> None:
        info = manifest.info
        if info is None or smallest_dtype(info.vocab_size) != self._writer.dtype:
            self._writer.finish_without_info()
            return
        self._writer.vocab_size = info.vocab_size
        self._writer.finish(
            tokenizer=info.tokenizer,
            tokenizer_fingerprint=info.tokenizer_fingerprint,
            **info.text_rules._asdict(),
            num_bytes=info.num_bytes,
            command=manifest.command,
            license=info.licence,
            sources=info.sources,
            left_out_sha256=None,
        )

    def close(self) -> None:
        with self._writer:  # removes what `finish` has not published
            pass
