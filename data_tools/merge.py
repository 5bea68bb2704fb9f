"""Join .bin/.idx corpora of one tokenizer: `python -m data_tools.merge --help`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data_tools.cli import program, run_command
from data_tools.corpus.corpus_info import CorpusInfo, SourceInfo
from data_tools.corpus.indexed import IndexedDataset
from data_tools.corpus.indexed_writer import IndexedDatasetWriter, append_corpora, vocab_size_of
from data_tools.corpus.origin import Origin, count_text_bytes, origin_of, require_tokenizer
from data_tools.errors import DataError
from data_tools.progress import progress_bar
from data_tools.tokenization.special_tokens import SpecialTokens

_EXAMPLE = """example:
  %(prog)s data/books data/code --output data/both
"""


def merge(
    prefixes: Sequence[str],
    output: str,
    *,
    tokenizer: str | None = None,
    eod: str | None = None,
    overwrite: bool = False,
    command: str = "",
) -> CorpusInfo | None:
    """Concatenate corpora, in the given order, into one corpus, and return its sidecar.

    `tokenizer` and `eod` are those of corpora without a sidecar, such as Megatron's. If no corpus
    has a sidecar and no tokenizer is given, the result has none either.

    Raises:
        DataError: a corpus cannot be read, only some have a sidecar and no tokenizer is given,
            their tokenizers, end or begin tokens differ, or the output is one of them or exists.
    """
    if len(prefixes) < 2:
        raise DataError(f"{len(prefixes)} corpus given; pass two or more to merge")
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    origins = _origins(datasets, tokenizer, eod)
    if Path(output).absolute() in {Path(prefix).absolute() for prefix in prefixes}:
        raise DataError(f"--output {output} is one of the corpora to merge; choose another")
    first = origins[0] if origins else None
    widest = max((dataset.dtype for dataset in datasets), key=lambda dtype: dtype.itemsize)
    vocab_size = vocab_size_of(widest) if first is None else first.vocab_size
    num_bytes = sum(_num_bytes(*each, tokenizer) for each in zip(datasets, origins, strict=False))
    total = sum(dataset.tokens.nbytes for dataset in datasets)
    with (
        IndexedDatasetWriter(output, vocab_size=vocab_size, overwrite=overwrite) as writer,
        progress_bar("merging", total) as report,
    ):
        append_corpora(writer, datasets, report)
        if first is None:
            writer.finish_without_info()
            return None
        sources = [each for d in datasets if d.info is not None for each in d.info.sources]
        return _finish(writer, origins, sources, num_bytes=num_bytes, command=command)


def _finish(
    writer: IndexedDatasetWriter,
    origins: Sequence[Origin],
    sources: list[SourceInfo],
    *,
    num_bytes: int,
    command: str,
) -> CorpusInfo:
    """Publish the corpus and its sidecar; what all corpora share is read from the first origin."""
    first = origins[0]
    return writer.finish(
        tokenizer=first.tokenizer,
        tokenizer_fingerprint=first.tokenizer_fingerprint,
        eod_id=first.text.eod_id,
        bos_ids=first.text.bos_ids,
        special_tokens=_special_tokens(origins),
        num_bytes=num_bytes,
        command=command,
        license="; ".join(dict.fromkeys(o.license for o in origins if o.license)) or None,
        sources=sources,
    )


def _origins(
    datasets: Sequence[IndexedDataset], tokenizer: str | None, eod: str | None
) -> list[Origin]:
    """Return the origin of each corpus, or an empty list if none is known."""
    without_sidecar = [dataset for dataset in datasets if dataset.info is None]
    if not without_sidecar and eod is not None:
        raise DataError(f"--eod {eod} has no effect: every corpus has a .json; remove it")
    if tokenizer is None and 0 < len(without_sidecar) < len(datasets):
        prefix = without_sidecar[0].prefix
        raise DataError(
            f"{prefix}: no {prefix.name}.json beside it, so its tokenizer cannot be compared with "
            "that of the others; pass --tokenizer SPEC"
        )
    found = [
        origin_of(dataset, tokenizer=tokenizer, eod=eod if dataset.info is None else None)
        for dataset in datasets
    ]
    origins = [origin for origin in found if origin is not None]
    for dataset, origin in zip(datasets, origins, strict=False):
        _check_same_tokenizer(datasets[0], origins[0], dataset, origin)
    return origins


def _num_bytes(dataset: IndexedDataset, origin: Origin, tokenizer: str | None) -> int:
    if dataset.info is not None:
        return dataset.info.num_bytes
    with progress_bar(f"decoding {dataset.prefix}", dataset.tokens.nbytes) as report:
        decoder = require_tokenizer(dataset, tokenizer)
        return count_text_bytes(dataset, decoder, origin.text, report)


def _special_tokens(origins: Sequence[Origin]) -> SpecialTokens:
    return "parse" if any(o.text.special_tokens == "parse" for o in origins) else "plain"


def _check_same_tokenizer(
    first: IndexedDataset, expected: Origin, dataset: IndexedDataset, origin: Origin
) -> None:
    for name, ours, theirs in (
        ("tokenizer_fingerprint", origin.tokenizer_fingerprint, expected.tokenizer_fingerprint),
        ("vocab_size", origin.vocab_size, expected.vocab_size),
        ("eod_id", origin.text.eod_id, expected.text.eod_id),
        ("bos_ids", list(origin.text.bos_ids or ()), list(expected.text.bos_ids or ())),
    ):
        if ours != theirs:
            raise DataError(
                f"{dataset.prefix}: {name} {ours} found, {theirs} expected as in {first.prefix}; "
                "only corpora with the same tokenizer, begin and end tokens can be merged: "
                "preprocess one of them again"
            )


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog=program("python -m data_tools.merge"),
        description="Join .bin/.idx corpora of one tokenizer; the inputs are not modified.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="corpora, without .bin")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="a new corpus")
    parser.add_argument(
        "--tokenizer", metavar="SPEC", help="tokenizer of corpora without a .json, as Megatron's"
    )
    parser.add_argument("--eod", metavar="TOKEN", help="end token of corpora without a .json")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    options = parser.parse_args(arguments)
    info = merge(
        options.prefixes,
        options.output,
        tokenizer=options.tokenizer,
        eod=options.eod,
        overwrite=options.overwrite,
        command=shlex.join(["python", "-m", "data_tools.merge", *arguments]),
    )
    if info is None:
        print(f"{options.output}.json: none, because its sources have none; see --tokenizer")
    merged = IndexedDataset(options.output)
    print(
        f"{options.output}.bin/.idx: {merged.num_documents:,} documents, "
        f"{merged.num_tokens:,} tokens ({merged.dtype.name})"
    )


command = partial(run_command, main)

if __name__ == "__main__":
    sys.exit(command())
