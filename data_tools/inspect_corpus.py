"""Statistics and samples of a .bin/.idx corpus, or the samples of the steps of a run:
`python -m data_tools.inspect_corpus --help`."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from data_tools.arrays import IntArray
from data_tools.cli import program, refuse_below, run_command
from data_tools.corpus.corpus_info import CorpusInfo
from data_tools.corpus.indexed import IndexedDataset
from data_tools.corpus.origin import find_tokenizer
from data_tools.corpus.token_stream import DocumentOrigin
from data_tools.errors import DataError
from data_tools.files import replace_atomically
from data_tools.step_samples import Sample, StepSamples
from data_tools.tokenization.tokenizers import Tokenizer

_EXAMPLE = """example:
  %(prog)s data/demo/train --samples 3 --histogram lengths.png
  %(prog)s --run runs/demo --steps 120:124     # what a loss spike saw
"""
_SHOWN_CHARACTERS = 200


def describe(dataset: IndexedDataset, *, max_documents: int) -> list[str]:
    """Return counts, lengths and the share of duplicates, one line each."""
    lengths = document_lengths(dataset)
    low, median, high = np.percentile(lengths, [1, 50, 99])
    lines = [
        f"documents     {dataset.num_documents:,}",
        f"tokens        {dataset.num_tokens:,} ({dataset.dtype.name})",
        f"length        min {lengths.min():,}  1% {low:,.0f}  median {median:,.0f}  "
        f"mean {lengths.mean():,.1f}  99% {high:,.0f}  max {lengths.max():,} tokens",
    ]
    info = dataset.info
    if info is not None:
        lines += [
            f"text          {info.num_bytes:,} bytes, {info.num_bytes / info.num_tokens:.3f} bytes "
            "per token",
            f"vocabulary    {info.vocab_size:,} ids, largest used {info.max_token_id}, "
            f"{_describe_boundary_tokens(info)}",
            f"tokenizer     {info.tokenizer} (SHA-256 {info.tokenizer_fingerprint[:16]})",
            f"written by    {info.command or 'unknown'}",
            f"license       {info.licence or 'not recorded'}",
        ]
        for source in info.sources:
            problems = "".join(f", {n:,} left out: {what}" for what, n in source.left_out.items())
            lines.append(
                f"source        {source.name}: {source.num_documents:,} documents, "
                f"{source.num_tokens:,} tokens{problems}"
            )
    else:
        lines.append("no .json beside it: bytes and tokenizer are unknown")
    num_compared = min(max_documents, dataset.num_documents)
    share = duplicate_share(dataset, num_compared)
    lines.append(
        f"duplicates    {share:.2%} of the first {num_compared:,} documents repeat an earlier one"
    )
    return lines


def _describe_boundary_tokens(info: CorpusInfo) -> str:
    begin = f"begin of document {', '.join(map(str, info.bos_ids))}, " if info.bos_ids else ""
    return f"{begin}end of document {info.eod_id}, special tokens {info.special_tokens}"


def document_lengths(dataset: IndexedDataset) -> IntArray:
    """Return the number of tokens of each document."""
    return np.diff(dataset.document_ends(0, dataset.num_documents), prepend=0)


def draw_histogram(lengths: IntArray, path: Path, *, title: str) -> None:
    """Plot a histogram of document lengths with a logarithmic axis, as a PNG.

    Raises:
        DataError: the path does not end in .png.
    """
    if path.suffix != ".png":
        raise DataError(f"--histogram {path} must end in .png, the only format; rename it")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(lengths, bins=np.geomspace(1, max(2, lengths.max()), 60).tolist())
    axes.set(xscale="log", xlabel="tokens", ylabel="documents", title=title)
    for name, value in (("median", np.median(lengths)), ("mean", lengths.mean())):
        axes.axvline(value, linestyle=":" if name == "mean" else "--", color="black")
        axes.annotate(f"{name} {value:,.0f}", (value, 1), xycoords=("data", "axes fraction"))
    with replace_atomically(path) as file:
        FigureCanvasAgg(figure).print_png(file)


def duplicate_share(dataset: IndexedDataset, num_documents: int) -> float:
    """Return the share of the first `num_documents` that equal an earlier document."""
    seen = {
        hashlib.blake2b(dataset.document(i).tobytes(), digest_size=12).digest()
        for i in range(num_documents)
    }
    return 1 - len(seen) / num_documents


def sample_texts(
    dataset: IndexedDataset, tokenizer: Tokenizer | None, *, num_samples: int, seed: int
) -> list[str]:
    """Return the beginnings of random documents as text, or as ids without a tokenizer."""
    generator = np.random.default_rng(seed)
    count = min(num_samples, dataset.num_documents)
    lines = []
    for document in np.sort(generator.choice(dataset.num_documents, size=count, replace=False)):
        ids = dataset.document(int(document))[:_SHOWN_CHARACTERS].tolist()
        if tokenizer is None:
            shown = f"ids {ids[:20]} ..."
        else:
            shown = repr(tokenizer.decode(ids, skip_special_tokens=False))
        lines.append(f"document {document}: {shown[:_SHOWN_CHARACTERS]}")
    return lines


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    _check_options(options)
    if options.run is not None:
        show_steps(
            StepSamples(
                Path(options.run),
                moved=dict(_source(each) for each in options.source),
                tokenizer=options.tokenizer,
            ),
            options.steps,
            planned=options.planned,
            as_json=options.json,
            whole=options.whole_text,
        )
        return
    dataset = IndexedDataset(options.prefix)
    compared = 1_000_000 if options.max_documents is None else options.max_documents
    print("\n".join(describe(dataset, max_documents=compared)))
    num_samples = 3 if options.samples is None else options.samples
    if num_samples:
        tokenizer = find_tokenizer(dataset, options.tokenizer)
        if tokenizer is None:
            print("samples       as ids, its tokenizer is not available: pass --tokenizer SPEC")
        texts = sample_texts(dataset, tokenizer, num_samples=num_samples, seed=options.seed or 0)
        print("\n".join(texts))
    if options.histogram:
        draw_histogram(document_lengths(dataset), Path(options.histogram), title=options.prefix)
        print(f"histogram     {options.histogram}")


def show_steps(
    samples: StepSamples, steps: str, *, planned: bool, as_json: bool, whole: bool
) -> None:
    """Print the samples of the steps FIRST:LAST, as text or as one JSON object per line.

    Raises:
        DataError: the steps have not been taken, or a source has changed.
    """
    first, last = _step_range(steps)
    samples.check_steps(first, last, planned=planned)
    for sample in samples.read(first, last):
        print(step_json(sample) if as_json else "\n".join(step_lines(sample, whole=whole)))


def step_json(sample: Sample) -> str:
    """Return a sample as one line of JSON, with all of its ids and text."""
    pieces = []
    for piece in sample.pieces:
        fields = piece._asdict()
        pieces.append({**fields.pop("origin")._asdict(), **fields})
    return json.dumps({**sample._asdict(), "pieces": pieces})


def step_lines(sample: Sample, *, whole: bool) -> list[str]:
    """Return one line about a sample and one about each of its documents; without `whole` only
    the beginning of their text."""
    skipped = ", skipped" if sample.is_skipped else ""
    lines = [
        f"step {sample.step}  sample {sample.number}  source {sample.source}  "
        f"epoch {sample.epoch}  tokens {sample.token}:{sample.token + len(sample.ids)}{skipped}"
    ]
    for piece in sample.pieces:
        text = f"ids {piece.ids}" if piece.text is None else repr(piece.text)
        if not whole and len(text) > _SHOWN_CHARACTERS:
            text = text[:_SHOWN_CHARACTERS] + " ..."
        lines.append(f"  {_describe_origin(piece.origin)}tokens {piece.begin}:{piece.end}: {text}")
    return lines


def _describe_origin(origin: DocumentOrigin) -> str:
    parts = [] if origin.document is None else [f"document {origin.document}"]
    if origin.input is not None:
        number = origin.line if origin.line is not None else origin.input_index
        what = "line" if origin.line is not None else "document"
        parts.append(f"{origin.input}, {what} {number}")
    return f"{' of '.join(parts)}, " if parts else ""


def _check_options(options: argparse.Namespace) -> None:
    """Refuse options that have no effect on what is asked for."""
    if (options.run is None) == (options.prefix is None):
        raise DataError("give the PREFIX of a corpus, or --run RUN with --steps FIRST:LAST")
    if (options.run is None) != (options.steps is None):
        raise DataError("--run RUN and --steps FIRST:LAST belong together; give both")
    of_run = {
        "--source": options.source,
        "--planned": options.planned,
        "--json": options.json,
        "--whole-text": options.whole_text,
    }
    given = [name for name, value in of_run.items() if value]
    if options.run is None and given:
        raise DataError(f"{given[0]} has no effect on a corpus; give --run RUN or remove it")
    of_corpus = {
        "--histogram": options.histogram,
        "--samples": options.samples,
        "--seed": options.seed,
        "--max-documents": options.max_documents,
    }
    given = [name for name, value in of_corpus.items() if value is not None]
    if options.run is not None and given:
        raise DataError(
            f"{given[0]} {of_corpus[given[0]]} has no effect with --run {options.run}; remove it"
        )
    refuse_below(1, options, "max_documents")
    refuse_below(0, options, "samples", "seed")


def _step_range(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    last = last or first
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise DataError(
            f"--steps {text} must be FIRST:LAST, both included, with 1 <= FIRST <= LAST; pass "
            "120:124, for example"
        )
    return int(first), int(last)


def _source(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise DataError(
            f"--source {text} must be NAME=PATH; pass the name of a source and its new path"
        )
    return name, path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("python -m data_tools.inspect_corpus"),
        description="Print counts, lengths, duplicates and samples of a .bin/.idx corpus; or,\n"
        "with --run and --steps, source, documents and text of every sample of some steps of\n"
        "a run.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prefix", nargs="?", help="PREFIX of PREFIX.bin and PREFIX.idx")
    parser.add_argument(
        "--tokenizer", metavar="SPEC", help="decodes the samples; default: the one in its .json"
    )
    parser.add_argument("--samples", type=int, help="random documents to show (default: 3)")
    parser.add_argument("--seed", type=int, help="seed of the random samples (default: 0)")
    parser.add_argument(
        "--max-documents",
        type=int,
        help="documents compared for duplicates (default: 1,000,000)",
    )
    parser.add_argument("--histogram", metavar="FILE.png", help="plot document lengths")
    run = parser.add_argument_group("steps of a run")
    run.add_argument("--run", metavar="RUN", help="run directory")
    run.add_argument("--steps", metavar="FIRST:LAST", help="steps to show, both included")
    run.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="where a source is now, if it has moved; repeatable",
    )
    run.add_argument(
        "--planned", action="store_true", help="also steps that the run has not logged or saved"
    )
    run.add_argument("--whole-text", action="store_true", help="do not shorten the text")
    run.add_argument("--json", action="store_true", help="one JSON object per sample, with ids")
    return parser


command = partial(run_command, main)

if __name__ == "__main__":
    sys.exit(command())
