"""Megatron: PREFIX.bin and PREFIX.idx (`corpus/indexed.py`), with PREFIX.json where we wrote it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.arrays import IntArray
from data_tools.corpus.corpus_info import CorpusInfo, info_path
from data_tools.corpus.indexed import HEADER, IndexedDataset
from data_tools.corpus.indexed_writer import IndexedDatasetWriter, vocab_size_of
from data_tools.corpus.origin import count_text_bytes, origin_of, require_tokenizer
from data_tools.errors import DataError
from data_tools.files import open_partial, partial_path, replace_atomically, sha256_of
from data_tools.formats.blocks import (
    Block,
    Boundary,
    ReadOptions,
    Source,
    WriteOptions,
    cut_at_ends,
)
from data_tools.formats.manifest import Manifest, manifest_path
from data_tools.formats.raw_files import raw_file
from data_tools.progress import progress_bar
from data_tools.verify import check_index

DTYPES = ("uint8", "uint16", "int32", "int64")
_DOCUMENTS = 1 << 16  # whose ends are read at once


def open_megatron(paths: Sequence[Path], options: ReadOptions) -> list[Source]:
    """Open corpora by their prefixes.

    Raises:
        DataError: a file is missing, truncated or of another format, or the two disagree.
    """
    return [_open(path) for path in paths]


def _open(prefix: Path) -> Source:
    if prefix.suffix in (".bin", ".idx") and prefix.is_file():
        raise DataError(
            f"{prefix}: it is a file, the prefix of a .bin and an .idx expected; pass "
            f"{prefix.with_suffix('')}"
        )
    dataset = IndexedDataset(prefix)
    plain = HEADER.size + 12 * dataset.num_sequences + 8 * (dataset.num_documents + 1)
    if (size := dataset.paths.idx.stat().st_size) != plain:
        raise DataError(
            f"{dataset.paths.idx}: {size} bytes found, {plain} expected without modes; it is "
            "multimodal, and no output can hold the modes: convert its text alone"
        )
    check_index(dataset)
    if dataset.info is not None and (found := sha256_of(dataset.paths.idx)) != (
        expected := dataset.info.idx_sha256
    ):
        raise DataError(
            f"{dataset.paths.idx}: SHA-256 {found} found, {expected} expected by the .json; it is "
            "damaged: copy it again, or delete the .json to convert it without its checks"
        )
    return Source(
        name=str(dataset.paths.bin),
        dtype=dataset.dtype,
        num_bytes=dataset.tokens.nbytes,
        paths=[dataset.paths.bin],
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
        ids_hash=f"sha256:{info.bin_sha256}",
        ends_hash=None,
        eod_id=info.eod_id,
        info=info,
    )


def add_info(prefix: Path, tokenizer: str, *, eod_id: int | None, command: str) -> CorpusInfo:
    """Write the .json of a corpus that has none; its bytes of text are counted by decoding.

    `eod_id`: the token that ends every document; None: that of the tokenizer, if it does.

    Raises:
        DataError: the tokenizer cannot be loaded.
    """
    dataset = IndexedDataset(prefix)
    origin = origin_of(dataset, tokenizer=tokenizer)
    assert origin is not None, "a tokenizer is given"
    text = origin.text if eod_id is None else origin.text._replace(eod_id=eod_id)
    decoder = require_tokenizer(dataset, tokenizer)
    with progress_bar(f"decoding {prefix}", dataset.tokens.nbytes) as report:
        num_bytes = count_text_bytes(dataset, decoder, text, report)
    info = CorpusInfo(
        tokenizer=origin.tokenizer,
        tokenizer_fingerprint=origin.tokenizer_fingerprint,
        vocab_size=origin.vocab_size,
        eod_id=text.eod_id,
        bos_ids=text.bos_ids or (),
        special_tokens=text.special_tokens or "parse",
        dtype=dataset.dtype.name,
        num_tokens=dataset.num_tokens,
        num_documents=dataset.num_documents,
        num_bytes=num_bytes,
        max_token_id=max(int(chunk.ids.max()) for chunk in dataset.chunks()),
        bin_sha256=sha256_of(dataset.paths.bin),
        idx_sha256=sha256_of(dataset.paths.idx),
        command=command,
    )
    with replace_atomically(info_path(prefix)) as file:
        file.write(info.to_bytes())
    return info


class MegatronWriter:
    """Writes OUTPUT.bin and OUTPUT.idx, and OUTPUT.json if the corpus once had one.

    Raises:
        DataError: one exists and `overwrite` is false, or another process is writing an output of
            this name in any format.
    """

    def __init__(self, output: Path, dtype: np.dtype[Any], options: WriteOptions) -> None:
        self._options = options
        # Other formats have a manifest, whose lock they hold: the marks are of one conversion.
        self._lock_path = partial_path(manifest_path(output))
        self._lock = open_partial(manifest_path(output))
        try:
            self._writer = IndexedDatasetWriter(
                output,
                vocab_size=vocab_size_of(dtype),
                overwrite=options.may_replace,
                with_info=options.info is not None,
                stored_in=options.stored_in,
                open_bin=options.open_stream,
            )
        except BaseException:
            self._unlock()
            raise

    def add(self, block: Block) -> None:
        self._writer.add_block(block.ids, block.ends)

    def finish(self, manifest: Manifest) -> None:
        info = manifest.info
        if info is None:
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
        if self._options.is_left:
            self._writer.leave()
        else:
            with self._writer:  # removes what `finish` has not published
                pass
        self._unlock()

    def _unlock(self) -> None:
        if not self._lock.closed:
            self._lock_path.unlink(missing_ok=True)
            self._lock.close()
