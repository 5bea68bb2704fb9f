"""Verify all data of a .bin/.idx corpus: `python -m data_tools.verify --help`."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from data_tools.cli import program, refuse_below, run_command
from data_tools.corpus.corpus_info import CorpusInfo, left_out_list
from data_tools.corpus.indexed import Chunk, IndexedDataset
from data_tools.corpus.jsonl_cache import verify_caches
from data_tools.errors import DataError
from data_tools.progress import ReportProgress, progress_bar
from data_tools.tokenization.tiktoken_files import split_tiktoken_spec
from data_tools.tokenization.tokenizers import tokenizer_fingerprint

_EXAMPLE = """example:
  %(prog)s data/train data/validation
"""
_BLOCK = 1 << 20  # index entries checked at once


def verify(prefix: str, *, vocab_size: int | None = None) -> list[str]:
    """Check every offset and id and, if the corpus has a sidecar, every value in it.

    Returns one line per check. Memory does not depend on the size of the corpus.

    Raises:
        DataError: on the first mismatch.
    """
    dataset = IndexedDataset(prefix)
    info = dataset.info
    check_index(dataset)
    limit = vocab_size if info is None else min(info.vocab_size, vocab_size or info.vocab_size)
    with progress_bar(f"verifying {prefix}", dataset.tokens.nbytes) as report:
        bin_sha256, max_token_id = _read_tokens(dataset, limit, report)
    lines = [
        f"{dataset.num_documents:,} documents and {dataset.num_tokens:,} tokens: offsets valid"
    ]
    if limit is None:
        lines.append("ids not negative; not compared with a vocabulary: pass --vocab-size N")
    else:
        lines.append(f"ids in [0, {limit}), largest {max_token_id}")
    if info is None:
        return [*lines, "no .json beside it: no checksums to compare with"]
    _compare(f"{dataset.paths.bin}: SHA-256", bin_sha256, info.bin_sha256)
    _compare(f"{dataset.paths.idx}: SHA-256", _sha256(dataset.paths.idx), info.idx_sha256)
    _compare(f"{prefix}.json: largest id", info.max_token_id, max_token_id)
    return [*lines, "checksums equal", *_check_others(dataset.prefix, info)]


def _check_others(prefix: Path, info: CorpusInfo) -> list[str]:
    """Check the list of documents left out, and the tokenizer if it still exists."""
    lines = []
    if info.left_out_sha256 is not None:
        path = left_out_list(prefix)
        _compare(f"{path}: SHA-256", _sha256(path), info.left_out_sha256)
        lines.append("list of documents left out equal")
    ranks = split_tiktoken_spec(info.tokenizer)
    if info.tokenizer != "bytes" and not Path(ranks[0] if ranks else info.tokenizer).exists():
        return [*lines, f"tokenizer {info.tokenizer} not found: not compared"]
    tokenizer = tokenizer_fingerprint(info.tokenizer)
    if tokenizer != info.tokenizer_fingerprint:
        raise DataError(
            f"{info.tokenizer}: SHA-256 {tokenizer} found, {info.tokenizer_fingerprint} expected; "
            f"it is not the tokenizer that made {prefix}: restore it, or preprocess again"
        )
    return [*lines, f"tokenizer {info.tokenizer} equal"]


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; preprocess the corpus again") from error


def check_index(dataset: IndexedDataset) -> None:
    """Check that sequences lie one after another, and documents too.

    Raises:
        DataError: names the first that does not.
    """
    itemsize = np.int64(dataset.dtype.itemsize)
    offset = 0
    for begin in range(0, dataset.num_sequences, _BLOCK):
        lengths = dataset.lengths[begin : begin + _BLOCK] * itemsize
        ends = offset + np.cumsum(lengths)
        if (lengths < 0).any():
            raise _damaged(dataset, begin + int(np.argmax(lengths < 0)), "a negative length")
        wrong = dataset.offsets[begin : begin + _BLOCK] != ends - lengths
        if wrong.any():
            number = begin + int(np.argmax(wrong))
            raise _damaged(dataset, number, "an offset that is not the end of the previous one")
        offset = int(ends[-1])
    for begin in range(0, dataset.num_documents, _BLOCK):
        bounds = dataset.document_bounds[begin : begin + _BLOCK + 1]
        if (np.diff(bounds) < 0).any():
            number = begin + int(np.argmax(np.diff(bounds) < 0))
            raise _damaged(dataset, int(bounds[number - begin]), "a document that ends before it")


def _read_tokens(
    dataset: IndexedDataset, vocab_size: int | None, report: ReportProgress
) -> tuple[str, int]:
    """Return the SHA-256 of .bin and its largest id."""
    digest = hashlib.sha256()
    largest = documents = num_bytes = 0
    for chunk in dataset.chunks():
        digest.update(chunk.ids.tobytes())
        low, high = int(chunk.ids.min()), int(chunk.ids.max())
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            raise _bad_id(dataset, chunk, vocab_size)
        largest = max(largest, high)
        documents += len(chunk.lengths)
        num_bytes += chunk.ids.nbytes
        report(documents, num_bytes)
    return digest.hexdigest(), largest


def _bad_id(dataset: IndexedDataset, chunk: Chunk, vocab_size: int | None) -> DataError:
    limit = np.iinfo(np.int64).max if vocab_size is None else vocab_size
    position = int(np.flatnonzero((chunk.ids < 0) | (chunk.ids >= limit))[0])
    ends = np.cumsum(chunk.lengths)
    document = int(np.searchsorted(ends, position, side="right"))
    offset = position - int(ends[document] - chunk.lengths[document])
    return DataError(
        f"{dataset.paths.bin}: id {chunk.ids[position]} at token {offset} of document "
        f"{chunk.first_document + document} is outside [0, {limit}); the vocabulary is the wrong "
        "one, or the file is damaged: preprocess the corpus again"
    )


def _compare(name: str, found: object, expected: object) -> None:
    if found != expected:
        raise DataError(f"{name} {found} found, {expected} expected; preprocess the corpus again")


def _damaged(dataset: IndexedDataset, sequence: int, problem: str) -> DataError:
    return DataError(
        f"{dataset.paths.idx}: sequence {sequence} has {problem}; it is damaged: preprocess the "
        "corpus again"
    )


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog=program("python -m data_tools.verify"),
        description="Check every offset, id and checksum of .bin/.idx corpora, and the cached text "
        "of .jsonl files.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prefixes", nargs="*", metavar="PREFIX", help="corpora, without .bin")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="every id must be below N")
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="check the cached text in DIR (data.cache_dir)"
    )
    options = parser.parse_args(arguments)
    if not options.prefixes and options.cache_dir is None:
        parser.error("nothing to check: pass a PREFIX or --cache-dir")
    refuse_below(1, options, "vocab_size")
    for prefix in options.prefixes:
        for line in verify(prefix, vocab_size=options.vocab_size):
            print(f"{prefix}: {line}")
    for path in verify_caches(options.cache_dir) if options.cache_dir is not None else ():
        print(f"{path}: checksum equal")


command = partial(run_command, main)

if __name__ == "__main__":
    sys.exit(command())
