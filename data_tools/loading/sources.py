"""Open the sources that a DataConfig names, and check that they fit the model and each other."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from data_tools.config import DataConfig, SourceConfig
from data_tools.corpus.byte_dataset import ByteStream, MappedFiles
from data_tools.corpus.corpus_info import TextRules, read_info
from data_tools.corpus.indexed import IndexedDataset
from data_tools.corpus.indexed_stream import IndexedStream
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
_PROBED_TOKENS = 1 << 14  # tokens of each block


def open_sources(
    config: DataConfig, sources: Sequence[SourceConfig], *, vocab_size: int
) -> list[NamedStream]:
    """Open sources and check them against the model's vocabulary and the run's tokenizer.

    Raises:
        DataError: a file is missing or damaged, ids do not fit the vocabulary, the tokenizers of
            the sources and `data.tokenizer` differ, or documents end or begin differently.
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
    """How the text of a run became tokens: what its corpora say, and `data.eod` where they do not.

    Raises:
        DataError: documents end, or begin, with other tokens in one source than in another, or
            than `data.eod` says.
    """
    if config.kind == "bytes":
        return TextRules(BYTE_EOD, (), "plain")
    infos = {
        f"data source {source.name}": info
        for source in (*config.train, *config.validation)
        if (info := read_info(local_prefix(source.path, cache_dir=config.cache_dir))) is not None
    }
    asked = _asked_eod(config)
    ends = {name: info.eod_id for name, info in infos.items()}
    if asked is not None:
        # What has no end token of its own may have one in its text, as chats do: that is said here.
        ends = {"data.eod": asked, **{n: end for n, end in ends.items() if end is not None}}
    eod_id = _only_one(ends, "end", asked)
    bos_ids = _only_one({name: info.bos_ids for name, info in infos.items()}, "begin", None)
    parsed = any(info.special_tokens == "parse" for info in infos.values())
    return TextRules(eod_id, bos_ids, ("parse" if parsed else "plain") if infos else None)


def _asked_eod(config: DataConfig) -> int | None:
    if not isinstance(config.eod, str):
        return config.eod
    if config.tokenizer is None:
        raise DataError(
            f"data.eod={config.eod} is a token, but there is no tokenizer to look it up in; set "
            "data.tokenizer, or give its id"
        )
    token = token_finder(config.tokenizer)(config.eod)
    if token is None:
        raise DataError(
            f"data.eod={config.eod} is not in the vocabulary of data.tokenizer={config.tokenizer}; "
            "name a token that is, or give its id"
        )
    return token


def _only_one(marks: Mapping[str, T], place: str, asked: int | None) -> T | None:
    """What all sources say that documents begin or end with; None where there are none."""
    if not marks:
        return None
    (first, expected), *others = marks.items()
    for name, found in others:
        if found != expected:
            remedy = "preprocess one of them again"
            if place == "end" and asked is None and None in (found, expected):
                token = expected if found is None else found
                remedy += f", or set data.eod={token} if the text of the other ends with it as well"
            elif asked is not None:
                remedy = "correct data.eod or preprocess it again"
            raise DataError(
                f"{name}: its documents {place} with {_shown(found)}, but those of {first} with "
                f"{_shown(expected)}; one model cannot learn both: {remedy}"
            )
    return expected


def _shown(mark: object) -> str:
    if mark is None or mark == ():
        return "no token for that"
    ids = mark if isinstance(mark, tuple) else (mark,)
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
        # Ids that occur, not those of a vocabulary file: an unused [PAD] may lie beyond the model.
        if dataset.info.max_token_id >= vocab_size:
            largest = dataset.info.max_token_id
            raise DataError(
                f"data source {name}: ids up to {largest} occur in it, but model.vocab_size is "
                f"{vocab_size}; set model.vocab_size to {largest + 1} or more (its tokenizer has "
                f"{dataset.info.vocab_size} ids)"
            )
        if dataset.info.vocab_size > vocab_size:
            logger.warning(
                "data source %s: its tokenizer has %d ids, model.vocab_size is %d; none of the "
                "others occurs in it, and the model will not know them",
                name,
                dataset.info.vocab_size,
                vocab_size,
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
