"""Join .bin/.idx corpora of one tokenizer: `python -m data_tools.merge --help`."""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from data_tools.cli import progress_bar, run_command
from data_tools.corpus_info import CorpusInfo
from data_tools.errors import DataError
from data_tools.indexed import IndexedDataset
from data_tools.indexed_writer import IndexedDatasetWriter
from data_tools.workers import ReportProgress

_EXAMPLE = """example:
  python -m data_tools.merge data/books data/code --output data/both
"""


def merge(
    prefixes: Sequence[str], output: str, *, overwrite: bool = False, command: str = ""
) -> CorpusInfo:
    """Write the documents of corpora, in the order given, as one corpus.

    Raises:
        DataError: a corpus cannot be read or has no sidecar, their tokenizers differ, or the
            output is one of them or exists.
    """
    if len(prefixes) < 2:
        raise DataError(f"{len(prefixes)} corpus given; name two or more to merge")
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    infos = [require_info(dataset) for dataset in datasets]
    first = infos[0]
    for dataset, info in zip(datasets, infos, strict=True):
        _check_same_tokenizer(datasets[0], first, dataset, info)
    if Path(output).absolute() in {Path(prefix).absolute() for prefix in prefixes}:
        raise DataError(f"--output {output} is one of the corpora to merge; choose another")
    total = sum(dataset.tokens.nbytes for dataset in datasets)
    with (
        IndexedDatasetWriter(output, vocab_size=first.vocab_size, overwrite=overwrite) as writer,
        progress_bar("merging", total) as report,
    ):
        append_corpora(writer, datasets, report)
        return writer.finish(
            tokenizer=first.tokenizer,
            tokenizer_fingerprint=first.tokenizer_fingerprint,
            eod_id=first.eod_id,
            num_bytes=sum(info.num_bytes for info in infos),
            command=command,
            licence="; ".join(dict.fromkeys(info.licence for info in infos if info.licence))
            or None,
            sources=[source for info in infos for source in info.sources],
        )


def append_corpora(
    writer: IndexedDatasetWriter, datasets: Iterable[IndexedDataset], report: ReportProgress
) -> None:
    """Copy documents in chunks.

    Raises:
        DataError: a corpus is not what its sidecar says, so that damage is not copied.
    """
    documents = num_bytes = 0
    for dataset in datasets:
        digest = hashlib.sha256()
        for chunk in dataset.chunks():
            digest.update(chunk.ids.tobytes())
            writer.add_documents(chunk.ids, chunk.lengths)
            documents += len(chunk.lengths)
            num_bytes += chunk.ids.nbytes
            report(documents, num_bytes)
        if dataset.info is not None and digest.hexdigest() != dataset.info.bin_sha256:
            raise DataError(
                f"{dataset.paths.bin}: SHA-256 {digest.hexdigest()} found, "
                f"{dataset.info.bin_sha256} expected; it is damaged: make it again"
            )


def require_info(dataset: IndexedDataset) -> CorpusInfo:
    """The sidecar of a corpus.

    Raises:
        DataError: it has none, as corpora that Megatron wrote.
    """
    if dataset.info is None:
        raise DataError(
            f"{dataset.prefix}: no {dataset.prefix.name}.json beside it, so its tokenizer and "
            "vocabulary are not known; train on it as a source of its own, or preprocess its text"
        )
    return dataset.info


def _check_same_tokenizer(
    first: IndexedDataset, expected: CorpusInfo, dataset: IndexedDataset, info: CorpusInfo
) -> None:
    for name in ("tokenizer_fingerprint", "vocab_size", "eod_id"):
        ours, theirs = getattr(info, name), getattr(expected, name)
        if ours != theirs:
            raise DataError(
                f"{dataset.prefix}: {name} {ours} found, {theirs} expected as in {first.prefix}; "
                "corpora of one tokenizer can be merged: preprocess one of them again"
            )


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.merge",
        description="Join .bin/.idx corpora of one tokenizer; the inputs stay as they are.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX")
    parser.add_argument("--output", required=True, metavar="PREFIX")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    options = parser.parse_args(arguments)
    info = merge(
        options.prefixes,
        options.output,
        overwrite=options.overwrite,
        command=shlex.join(["python", "-m", "data_tools.merge", *arguments]),
    )
    print(
        f"{options.output}.bin/.idx: {info.num_documents:,} documents, {info.num_tokens:,} tokens "
        f"({info.dtype})"
    )


command = partial(run_command, main)

if __name__ == "__main__":
    sys.exit(command())
