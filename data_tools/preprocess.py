"""Tokenize text into a .bin/.idx corpus: `python -m data_tools.preprocess --help`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import lru_cache, partial
from itertools import chain
from typing import NamedTuple

import numpy as np

from data_tools.cli import add_text_arguments, map_in_order, progress_bar, run_command, usable_cpus
from data_tools.corpus_info import CorpusInfo
from data_tools.documents import (
    BadDocumentError,
    DocumentReader,
    RawDocument,
    batch_documents,
    extract_text,
    find_inputs,
)
from data_tools.errors import DataError
from data_tools.indexed_writer import IndexedDatasetWriter
from data_tools.permutation import IntArray
from data_tools.tokenizers import Tokenizer, load_tokenizer

_EXAMPLE = """example:
  python -m data_tools.preprocess --input corpus/ more.jsonl.zst --output data/train \\
      --tokenizer data/tokenizer.model --workers 8
"""
_MAX_LISTED = 10


class EncodingSettings(NamedTuple):
    """How a document becomes tokens."""

    tokenizer: str
    eod: str | None
    append_eod: bool
    json_key: str
    skip_bad_lines: bool


class EncodedDocuments(NamedTuple):
    """A batch of documents as tokens; empty documents have length 0."""

    ids: IntArray
    lengths: IntArray
    num_bytes: int
    bad_documents: list[str]


class Report(NamedTuple):
    """What a run of `preprocess` wrote and left out."""

    info: CorpusInfo
    num_empty: int
    num_bad: int
    first_bad: list[str]


def preprocess(
    inputs: Sequence[str],
    output: str,
    *,
    settings: EncodingSettings,
    num_workers: int = 1,
    overwrite: bool = False,
    command: str = "",
) -> Report:
    """Tokenize documents into OUTPUT.bin, .idx and .json; the same files at any `num_workers`.

    Raises:
        DataError: an input or the tokenizer cannot be used, or the output exists. Nothing is
            written then.
    """
    tokenizer = _tokenizer(settings.tokenizer, settings.eod)
    reader = DocumentReader(find_inputs(inputs))
    encode = partial(encode_documents, settings=settings)
    num_documents = num_empty = num_bytes = num_bad = 0
    first_bad: list[str] = []
    with (
        IndexedDatasetWriter(
            output, vocab_size=tokenizer.vocab_size, overwrite=overwrite
        ) as writer,
        progress_bar("tokenizing", reader.total_bytes) as report,
        closing(map_in_order(encode, batch_documents(reader), num_workers=num_workers)) as batches,
    ):
        for encoded in batches:
            writer.add_documents(encoded.ids, encoded.lengths)
            num_empty += int((encoded.lengths == 0).sum())
            num_bytes += encoded.num_bytes
            num_documents += len(encoded.lengths)
            num_bad += len(encoded.bad_documents)
            first_bad += encoded.bad_documents[: _MAX_LISTED - len(first_bad)]
            report(num_documents, reader.bytes_read)
        info = writer.finish(
            tokenizer=settings.tokenizer,
            tokenizer_fingerprint=tokenizer.fingerprint,
            eod_id=tokenizer.eod_id if settings.append_eod else None,
            num_bytes=num_bytes,
            command=command,
        )
    return Report(info, num_empty, num_bad, first_bad)


def encode_documents(
    documents: Sequence[RawDocument], *, settings: EncodingSettings
) -> EncodedDocuments:
    """Tokenize a batch; runs in worker processes.

    Raises:
        BadDocumentError: a document is not what its file promises, and bad ones are not skipped.
    """
    texts, bad_documents = [], []
    for document in documents:
        try:
            texts.append(extract_text(document, json_key=settings.json_key))
        except BadDocumentError as error:
            if not settings.skip_bad_lines:
                raise
            bad_documents.append(str(error))
    tokenizer = _tokenizer(settings.tokenizer, settings.eod)
    end = [tokenizer.eod_id] if settings.append_eod else []
    encoded = [ids + end if ids else [] for ids in tokenizer.encode_batch(texts)]
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
    return EncodedDocuments(
        ids=np.fromiter(chain.from_iterable(encoded), dtype=np.int64, count=int(lengths.sum())),
        lengths=lengths,
        num_bytes=sum(len(text.encode("utf-8")) for text in texts),
        bad_documents=bad_documents,
    )


@lru_cache(maxsize=1)
def _tokenizer(spec: str, eod: str | None) -> Tokenizer:
    return load_tokenizer(spec, eod=eod)


def summary(output: str, report: Report) -> str:
    """What was written, in one line."""
    info = report.info
    return (
        f"{output}.bin/.idx: {info.num_documents:,} documents, {info.num_tokens:,} tokens "
        f"({info.dtype}), {info.num_bytes / info.num_tokens:.2f} bytes per token"
    )


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    options = _parser().parse_args(arguments)
    if options.workers < 1:
        raise DataError(f"--workers {options.workers} must be 1 or more")
    if options.eod is not None and not options.append_eod:
        raise DataError(f"--eod {options.eod} has no effect with --no-append-eod; remove one")
    report = preprocess(
        options.input,
        options.output,
        settings=EncodingSettings(
            tokenizer=options.tokenizer,
            eod=options.eod,
            append_eod=options.append_eod,
            json_key=options.json_key,
            skip_bad_lines=options.on_bad_line == "skip",
        ),
        num_workers=options.workers,
        overwrite=options.overwrite,
        command=shlex.join(["python", "-m", "data_tools.preprocess", *arguments]),
    )
    print(summary(options.output, report))
    if report.num_empty:
        print(f"{report.num_empty:,} empty documents left out")
    for reason in report.first_bad:
        print(f"skipped: {reason}", file=sys.stderr)
    if report.num_bad:
        print(f"{report.num_bad:,} bad documents skipped", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.preprocess",
        description="Tokenize text into a memory-mapped corpus in Megatron's .bin/.idx format.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_text_arguments(parser)
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin ...")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="SPEC",
        help="bytes, a tokenizer.json, a directory with one, or a SentencePiece .model",
    )
    parser.add_argument("--workers", type=int, default=usable_cpus(), help="worker processes")
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the tokenizer's end token",
    )
    parser.add_argument("--eod", metavar="TOKEN", help="end token, when the tokenizer names none")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
