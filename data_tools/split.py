"""Split a .bin/.idx corpus into training and validation: `python -m data_tools.split --help`."""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.cli import progress_bar, run_command
from data_tools.corpus_info import CorpusInfo
from data_tools.errors import DataError
from data_tools.indexed import Chunk, IndexedDataset
from data_tools.indexed_writer import IndexedDatasetWriter
from data_tools.inspect_corpus import find_tokenizer
from data_tools.merge import require_info
from data_tools.permutation import TokenArray
from data_tools.tokenizers import Tokenizer

_EXAMPLE = """example:
  python -m data_tools.split data/all --train data/train --validation data/validation --share 0.01
"""
_HASH_RANGE = 1 << 64


class Split(NamedTuple):
    """The sidecars of the two halves."""

    train: CorpusInfo
    validation: CorpusInfo


def split(
    prefix: str,
    train: str,
    validation: str,
    *,
    share: float,
    seed: int = 0,
    tokenizer: str | None = None,
    overwrite: bool = False,
    command: str = "",
) -> Split:
    """Send a `share` of the documents to validation, chosen by a hash of their tokens and the seed.

    Equal documents go the same way, also those of different corpora that were split with one seed.
    Bytes of text, which bits per byte divides by, are counted by decoding the validation documents.

    Raises:
        DataError: `share` is not between 0 and 1, the corpus has no sidecar, its tokenizer is not
            at hand, an output exists, or one half would be empty.
    """
    _check(prefix, train, validation, share)
    dataset = IndexedDataset(prefix)
    info = require_info(dataset)
    decoder = _require_tokenizer(dataset, tokenizer)
    with (
        IndexedDatasetWriter(train, vocab_size=info.vocab_size, overwrite=overwrite) as first,
        IndexedDatasetWriter(validation, vocab_size=info.vocab_size, overwrite=overwrite) as second,
    ):
        num_bytes = _deal(dataset, first, second, decoder, share, seed)
        kept = info.model_copy(update={"command": command, "sources": ()})
        # Both before either is published: a half that is empty must leave nothing.
        for writer in (first, second):
            if writer.num_documents == 0:
                raise DataError(
                    f"{writer.prefix}: no document fell to it of {dataset.num_documents}; choose "
                    "another --share or --seed"
                )
        return Split(
            _finish(first, kept, info.num_bytes - num_bytes), _finish(second, kept, num_bytes)
        )


def _check(prefix: str, train: str, validation: str, share: float) -> None:
    if not 0 < share < 1:
        raise DataError(f"--share {share} must be between 0 and 1: what goes to validation")
    if len({Path(path).absolute() for path in (prefix, train, validation)}) < 3:
        raise DataError(
            f"{prefix}, --train {train} and --validation {validation} must be three different "
            "corpora; choose other outputs"
        )


def _require_tokenizer(dataset: IndexedDataset, spec: str | None) -> Tokenizer:
    tokenizer = find_tokenizer(dataset, spec)
    if tokenizer is None:
        raise DataError(
            f"{dataset.prefix}: its tokenizer {require_info(dataset).tokenizer} is not there or "
            "has changed, so the bytes of the halves cannot be counted; pass --tokenizer SPEC"
        )
    return tokenizer


def goes_to_validation(document: TokenArray, *, share: float, seed: int) -> bool:
    """By a hash of the ids, whatever their dtype."""
    key = seed.to_bytes(8, "little", signed=True)
    data = document.astype("<i8").tobytes()
    digest = hashlib.blake2b(data, digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") < share * _HASH_RANGE


def _deal(
    dataset: IndexedDataset,
    train: IndexedDatasetWriter,
    validation: IndexedDatasetWriter,
    decoder: Tokenizer,
    share: float,
    seed: int,
) -> int:
    """Write each document to one of two corpora; the bytes of text of the second."""
    done = documents = num_bytes = 0
    eod_id = require_info(dataset).eod_id
    with progress_bar("splitting", dataset.tokens.nbytes) as report:
        for chunk in dataset.chunks():
            texts = np.split(chunk.ids, np.cumsum(chunk.lengths)[:-1])
            chosen = np.array([goes_to_validation(t, share=share, seed=seed) for t in texts])
            _add(train, chunk, ~chosen)
            _add(validation, chunk, chosen)
            for text in (text for text, is_chosen in zip(texts, chosen, strict=True) if is_chosen):
                ids = text[:-1] if eod_id is not None and text[-1] == eod_id else text
                num_bytes += len(decoder.decode(ids.tolist()).encode("utf-8"))
            documents += len(texts)
            done += chunk.ids.nbytes
            report(documents, done)
    return num_bytes


def _add(writer: IndexedDatasetWriter, chunk: Chunk, chosen: TokenArray) -> None:
    writer.add_documents(chunk.ids[np.repeat(chosen, chunk.lengths)], chunk.lengths[chosen])


def _finish(writer: IndexedDatasetWriter, info: CorpusInfo, num_bytes: int) -> CorpusInfo:
    return writer.finish(
        tokenizer=info.tokenizer,
        tokenizer_fingerprint=info.tokenizer_fingerprint,
        eod_id=info.eod_id,
        num_bytes=num_bytes,
        command=info.command,
        licence=info.licence,
    )


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    options = _parser().parse_args(arguments)
    result = split(
        options.prefix,
        options.train,
        options.validation,
        share=options.share,
        seed=options.seed,
        tokenizer=options.tokenizer,
        overwrite=options.overwrite,
        command=shlex.join(["python", "-m", "data_tools.split", *arguments]),
    )
    for name, info in ((options.train, result.train), (options.validation, result.validation)):
        print(f"{name}.bin/.idx: {info.num_documents:,} documents, {info.num_tokens:,} tokens")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.split",
        description="Split a .bin/.idx corpus by a hash of each document, so that equal documents "
        "never cross.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prefix", metavar="PREFIX")
    parser.add_argument("--train", required=True, metavar="PREFIX")
    parser.add_argument("--validation", required=True, metavar="PREFIX")
    parser.add_argument("--share", type=float, required=True, help="of documents, to validation")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another choice")
    parser.add_argument("--tokenizer", metavar="SPEC", help="default: the one the corpus names")
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    return parser


command = partial(run_command, main)

if __name__ == "__main__":
    sys.exit(command())
