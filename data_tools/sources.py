"""Open the sources that a DataConfig names, and check that they fit the model and each other."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from data_tools.byte_dataset import BYTE_VOCAB_SIZE, ByteStream, MappedFiles, expand_paths
from data_tools.config import DataConfig, SourceConfig
from data_tools.corpus_info import read_info
from data_tools.errors import DataError
from data_tools.indexed import IndexedDataset
from data_tools.jsonl_image import open_jsonl
from data_tools.remote import local_prefix
from data_tools.token_dataset import IndexedStream
from data_tools.token_stream import NamedStream, TokenStream
from data_tools.tokenizers import tokenizer_fingerprint

logger = logging.getLogger(__name__)

_PROBED_BLOCKS = 64
_PROBED_TOKENS = 1 << 14  # tokens of each block


def open_sources(
    config: DataConfig, sources: Sequence[SourceConfig], *, vocab_size: int
) -> list[NamedStream]:
    """Open sources and check them against the model's vocabulary and the run's tokenizer.

    Raises:
        DataError: a file is missing or damaged, ids do not fit the vocabulary, or the tokenizers
            of the sources and `data.tokenizer` differ.
    """
    if config.kind == "bytes":
        _check_byte_vocabulary(vocab_size)
        return [NamedStream(source.name, _byte_stream(config, source.path)) for source in sources]
    datasets = [
        IndexedDataset(local_prefix(source.path, cache_dir=config.cache_dir)) for source in sources
    ]
    _check_tokenizers(config)
    for source, dataset in zip(sources, datasets, strict=True):
        _check_vocabulary(source.name, dataset, vocab_size)
    return [
        NamedStream(source.name, IndexedStream(dataset))
        for source, dataset in zip(sources, datasets, strict=True)
    ]


def _byte_stream(config: DataConfig, path: str) -> TokenStream:
    if config.documents == "jsonl":
        files = MappedFiles(expand_paths(path, suffixes=(".jsonl",)))
        return open_jsonl(files, json_key=config.json_key or "text", cache_dir=config.cache_dir)
    files = MappedFiles(expand_paths(path))
    return ByteStream(files, blank_lines=config.documents == "blank_line")


def _check_byte_vocabulary(vocab_size: int) -> None:
    if vocab_size < BYTE_VOCAB_SIZE:
        raise DataError(
            f"model.vocab_size is {vocab_size}, but data.kind bytes uses ids up to "
            f"{BYTE_VOCAB_SIZE - 1}; set it to {BYTE_VOCAB_SIZE} or more"
        )


def _check_vocabulary(name: str, dataset: IndexedDataset, vocab_size: int) -> None:
    if dataset.info is not None:
        if dataset.info.vocab_size > vocab_size:
            raise DataError(
                f"data source {name}: its tokenizer has {dataset.info.vocab_size} ids (largest "
                f"used: {dataset.info.max_token_id}), but model.vocab_size is {vocab_size}; set "
                f"model.vocab_size to {dataset.info.vocab_size} or more"
            )
        return
    logger.warning(
        "%s: no %s.json beside it: its tokenizer cannot be checked and bits per byte are not known",
        dataset.paths.bin,
        dataset.prefix.name,
    )
    starts = np.linspace(0, dataset.num_tokens - 1, _PROBED_BLOCKS).astype(np.int64)
    for start in np.unique(starts):
        block = dataset.tokens[start : start + _PROBED_TOKENS]
        if block.max() >= vocab_size or block.min() < 0:
            wrong = block.min() if block.min() < 0 else block.max()
            raise DataError(
                f"data source {name}: token id {wrong} is outside model.vocab_size {vocab_size}; "
                "set model.vocab_size to the tokenizer's"
            )


def corpus_tokenizer(config: DataConfig) -> str | None:
    """The fingerprint of what made the tokens of the sources; None where nothing says it.

    Raises:
        DataError: the sources are of different tokenizers, or `data.tokenizer` is not there.
    """
    return "bytes" if config.kind == "bytes" else _check_tokenizers(config)


def _check_tokenizers(config: DataConfig) -> str | None:
    """All sources of training and validation must come from one tokenizer: its fingerprint."""
    expected = None
    if config.tokenizer is not None:
        try:
            expected = tokenizer_fingerprint(config.tokenizer)
        except DataError as error:
            raise DataError(f"data.tokenizer: {error}") from error
    owner = "data.tokenizer"
    for source in (*config.train, *config.validation):
        info = read_info(local_prefix(source.path, cache_dir=config.cache_dir))
        if info is None:
            continue
        if expected is None:
            expected, owner = info.tokenizer_fingerprint, f"data source {source.name}"
        if info.tokenizer_fingerprint != expected:
            raise DataError(
                f"data source {source.name} was made with tokenizer {info.tokenizer} "
                f"({info.tokenizer_fingerprint[:12]}), but {owner} has {expected[:12]}; "
                "preprocess it with the same tokenizer"
            )
    return expected
