"""Opening of the sources of a DataConfig, and checks against the model and each other."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import numpy as np

from data_tools.config import DataConfig, SourceConfig
from data_tools.corpus.byte_dataset import ByteStream, MappedFiles
from data_tools.corpus.corpus_info import TextRules, read_info
from data_tools.corpus.indexed import IndexedDataset, IndexedStream
from data_tools.corpus.jsonl_cache import open_jsonl
from data_tools.corpus.remote import local_prefix
from data_tools.corpus.token_stream import NamedStream, TokenStream
from data_tools.errors import DataError
from data_tools.files import expand_paths
from data_tools.tokenization.byte_vocabulary import BYTE_EOD, BYTE_VOCAB_SIZE
from data_tools.tokenization.tokenizers import token_finder, tokenizer_fingerprint

T = TypeVar("T")
logger = logging.getLogger(__name__)

_PROBED_BLOCKS = 64
_PROBED_TOKENS = 1 << 14  # per block


def open_sources(
    config: DataConfig, sources: Sequence[SourceConfig], *, vocab_size: int
) -> list[NamedStream]:
    """Open sources and check them against the model's vocabulary and the run's tokenizer.

    Raises:
        DataError: a file is missing or damaged, ids do not fit the vocabulary, the tokenizers of
            the sources and `data.tokenizer` differ, or their begin or end tokens differ.
    """
    if config.kind == "bytes":
        _check_byte_vocabulary(vocab_size)
        return [NamedStream(source.name, _byte_stream(config, source.path)) for source in sources]
    datasets = [
        IndexedDataset(local_prefix(source.path, cache_dir=config.cache_dir)) for source in sources
    ]
    _check_tokenizers(config)
    text = read_text_rules(config)
    for source, dataset in zip(sources, datasets, strict=True):
        _check_vocabulary(source.name, dataset, vocab_size)
    return [
        NamedStream(source.name, IndexedStream(dataset, eod_id=text.eod_id))
        for source, dataset in zip(sources, datasets, strict=True)
    ]


def read_text_rules(config: DataConfig) -> TextRules:
    """Return the encoding rules of the corpora of a run, with `data.eod` where they record none.

    Raises:
        DataError: sources differ in their begin or end token, or from `data.eod`.
    """
    if config.kind == "bytes":
        return TextRules(BYTE_EOD, (), "plain")
    infos = {
        f"data source {source.name}": info
        for source in (*config.train, *config.validation)
        if (info := read_info(local_prefix(source.path, cache_dir=config.cache_dir))) is not None
    }
    configured = _configured_eod(config)
    eods = {name: info.eod_id for name, info in infos.items()}
    if configured is not None:
        # A corpus without a recorded end token may have one in its text, as chats do.
        eods = {"data.eod": configured, **{n: eod for n, eod in eods.items() if eod is not None}}
    eod_id = _common_tokens(eods, "end", configured)
    bos_ids = _common_tokens({name: info.bos_ids for name, info in infos.items()}, "begin", None)
    parsed = any(info.special_tokens == "parse" for info in infos.values())
    return TextRules(eod_id, bos_ids, ("parse" if parsed else "plain") if infos else None)


def _configured_eod(config: DataConfig) -> int | None:
    if not isinstance(config.eod, str):
        return config.eod
    if config.tokenizer is None:
        raise DataError(
            f"data.eod={config.eod} is a token, but there is no tokenizer to look it up in; set "
            "data.tokenizer, or set data.eod to its id"
        )
    token = token_finder(config.tokenizer)(config.eod)
    if token is None:
        raise DataError(
            f"data.eod={config.eod} is not in the vocabulary of data.tokenizer={config.tokenizer}; "
            "set it to a token that is, or to an id"
        )
    return token


def _common_tokens(
    tokens: Mapping[str, T], verb: Literal["begin", "end"], configured_eod: int | None
) -> T | None:
    """Return the begin or end tokens shared by all sources; None without sources."""
    if not tokens:
        return None
    (first, expected), *others = tokens.items()
    for name, found in others:
        if found != expected:
            remedy = "preprocess one of them again"
            if verb == "end" and configured_eod is None and None in (found, expected):
                token = expected if found is None else found
                remedy += f", or set data.eod={token} if the text of the other ends with it as well"
            elif configured_eod is not None:
                remedy = "correct data.eod or preprocess it again"
            raise DataError(
                f"{name}: its documents {verb} with {_format_ids(found)}, but those of {first} "
                f"with {_format_ids(expected)}; one model cannot learn both: {remedy}"
            )
    return expected


def _format_ids(value: object) -> str:
    if value is None or value == ():
        return "no dedicated token"
    ids = value if isinstance(value, tuple) else (value,)
    return f"{'ids' if len(ids) > 1 else 'id'} {', '.join(map(str, ids))}"


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
        # Only ids that occur count: an unused [PAD] may exceed the model's vocabulary.
        if dataset.info.max_token_id >= vocab_size:
            largest = dataset.info.max_token_id
            raise DataError(
                f"data source {name}: ids up to {largest} occur in it, but model.vocab_size is "
                f"{vocab_size}; set model.vocab_size to {largest + 1} or more (its tokenizer has "
                f"{dataset.info.vocab_size} ids)"
            )
        if dataset.info.vocab_size > vocab_size:
            logger.warning(
                "data source %s: its tokenizer has %d ids, model.vocab_size is %d; the ids beyond "
                "do not occur in it, and the model will not know them",
                name,
                dataset.info.vocab_size,
                vocab_size,
            )
        return
    logger.warning(
        "%s: no %s.json beside it: its tokenizer cannot be checked and bits per byte are unknown",
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
    """Return the fingerprint of the sources' tokenizer; None if no source records it.

    Raises:
        DataError: the sources have different tokenizers, or `data.tokenizer` does not exist.
    """
    return "bytes" if config.kind == "bytes" else _check_tokenizers(config)


def _check_tokenizers(config: DataConfig) -> str | None:
    """Check that all sources have the same tokenizer, and return its fingerprint."""
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
