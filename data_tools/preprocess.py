"""Tokenize text into a .bin/.idx corpus: `python -m data_tools.preprocess --help`.

The input is cut into shards (inputs.py, shards.py). Every process takes some of them, in
OUTPUT.work; the first process joins what all have finished and publishes it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from data_tools.cli import add_text_arguments, run_command, usable_cpus
from data_tools.corpus.corpus_info import CorpusInfo, left_out_list
from data_tools.errors import DataError
from data_tools.preprocessing.documents import MAX_DOCUMENT_BYTES
from data_tools.preprocessing.encoding import EncodingSettings
from data_tools.preprocessing.inputs import Source, cut_pieces, find_inputs, total_size
from data_tools.preprocessing.join_shards import MAX_LISTED, Job, Report, publish, summary
from data_tools.preprocessing.multi_node import OneRank, Ranks, find_ranks
from data_tools.preprocessing.resume_folder import Settings, WorkFolder
from data_tools.preprocessing.shards import (
    Shard,
    encode_shard,
    plan_shards,
    read_report,
    shard_bytes,
)
from data_tools.preprocessing.workers import run_tasks
from data_tools.progress import progress_bar
from data_tools.tokenization.tokenizers import TOKENIZER_HELP

_EXAMPLE = """example:
  python -m data_tools.preprocess --input corpus/ more.jsonl.zst --output data/train \\
      --tokenizer data/tokenizer.model --workers 8
  srun --nodes 4 python -m data_tools.preprocess ...   # on many machines; or mpirun, with mpi4py
"""


def preprocess(job: Job, *, num_workers: int = 1) -> Report:
    """Tokenize documents into OUTPUT.bin, .idx and .json, as the only rank.

    Raises:
        DataError: see `preprocess_as_rank`.
    """
    report = preprocess_as_rank(OneRank(), job, num_workers=num_workers)
    assert report is not None, "rank 0 has one"
    return report


def preprocess_as_rank(ranks: Ranks, job: Job, *, num_workers: int) -> Report | None:
    """Do this rank's share of a job; rank 0 publishes the output and has the report.

    The same files come out at any number of workers and ranks. A run that was killed goes on from
    its finished shards.

    Raises:
        DataError: an input or the tokenizer cannot be used, or the output exists. There is no
            output then.
    """
    folder = WorkFolder(Path(job.output))
    sources: list[Source] = []
    shards: list[Shard] = []

    def begin() -> None:
        sources.extend(find_inputs(job.inputs))
        shards.extend(_plan(job, sources))
        folder.plan(_identity(job.settings), shards)
        if ranks.rank == 0:
            folder.claim(overwrite=job.overwrite)

    try:
        # A failure is told to all ranks, so that none waits for one that has given up.
        failures = ranks.gather("begin", _failure(begin), last=False)
        if not any(failures) and not folder.is_published():
            share = _share(shards, ranks)
            work = partial(_encode, job, share, folder, num_workers)
            failures = [_failure(work)]
        failures = ranks.gather("end", next(filter(None, failures), ""), last=True)
        if failure := next(filter(None, failures), None):
            kept = folder.num_finished()
            raise DataError(failure + (_kept(kept, len(shards), folder) if kept else ""))
        return publish(job, sources, shards, folder) if ranks.rank == 0 else None
    finally:
        folder.release()


def _plan(job: Job, sources: Sequence[Source]) -> Iterator[Shard]:
    num_bytes = job.shard_bytes or shard_bytes(total_size(sources))
    pieces = cut_pieces(sources, piece_bytes=num_bytes, json_key=job.settings.json_key)
    return plan_shards(pieces, num_bytes=num_bytes)


def _identity(settings: EncodingSettings) -> Settings:
    """What the contents of a shard depend on beside its pieces."""
    tokenizer, text = settings.load_tokenizer(), settings.text_rules()
    return {
        "version": 1,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": text.eod_id,
        "bos_ids": list(text.bos_ids or ()),
        "special_tokens": text.special_tokens,
        "max_document_bytes": settings.max_document_bytes,
        "json_key": settings.json_key,
    }


def _share(shards: Sequence[Shard], ranks: Ranks) -> list[Shard]:
    """Shards of this rank: the large ones dealt out first, and each rank's large ones first.

    Finished ones are dealt out as well: ranks may not see each other's latest files alike.
    """
    by_size = sorted(shards, key=lambda shard: shard.size, reverse=True)
    return by_size[ranks.rank :: ranks.size]


def _failure(work: Callable[[], None]) -> str:
    try:
        work()
    except (DataError, OSError) as error:
        return str(error)
    return ""


def _kept(finished: int, total: int, folder: WorkFolder) -> str:
    return f" ({finished} of {total} shards are done and kept in {folder.path} for the next run)"


def _encode(job: Job, share: Sequence[Shard], folder: WorkFolder, num_workers: int) -> None:
    left = [shard for shard in share if read_report(folder.path, shard) is None]
    if len(left) < len(share):
        print(f"{len(share) - len(left)} of {len(share)} shards were finished before")
    encode = partial(encode_shard, settings=job.settings, folder=folder.path)
    with progress_bar("tokenizing", sum(shard.size for shard in left)) as report:
        run_tasks(encode, left, num_workers=min(num_workers, max(1, len(left))), report=report)


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    options = _parser().parse_args(arguments)
    # Workers are the parallelism: a tokenizer's threads would fight them for the same CPUs.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    settings = EncodingSettings(
        tokenizer=options.tokenizer,
        eod=options.eod,
        append_eod=options.append_eod,
        json_key=options.json_key,
        skip_bad_lines=options.on_bad_line == "skip",
        add_bos=options.add_bos,
        special_tokens=options.special_tokens,
        vocab_size=options.vocab_size,
        max_document_bytes=_max_document_bytes(options),
    )
    _check_options(options, settings)
    job = Job(
        inputs=options.input,
        output=options.output,
        settings=settings,
        overwrite=options.overwrite,
        licence=options.licence,
        command=shlex.join(["python", "-m", "data_tools.preprocess", *arguments]),
        shard_bytes=options.shard_megabytes and options.shard_megabytes << 20,
    )
    meeting_place = WorkFolder(Path(options.output)).path.joinpath
    report = preprocess_as_rank(find_ranks(meeting_place), job, num_workers=options.workers)
    if report is not None:
        _print_report(options.output, settings, report)


def _check_options(options: argparse.Namespace, settings: EncodingSettings) -> None:
    for name in ("workers", "shard_megabytes", "vocab_size", "max_document_megabytes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise DataError(f"--{name.replace('_', '-')} {value} must be 1 or more")
    if options.eod is not None and not options.append_eod:
        raise DataError(f"--eod {options.eod} has no effect with --no-append-eod; remove one")
    if options.vocab_size is not None:
        _check_marks(settings, options.vocab_size)


def _check_marks(settings: EncodingSettings, vocab_size: int) -> None:
    """What is in every document must fit a model; of other ids, those that occur must."""
    text = settings.text_rules()
    ids = [*(text.bos_ids or ()), *([] if text.eod_id is None else [text.eod_id])]
    if max(ids, default=0) >= vocab_size:
        raise DataError(
            f"--vocab-size {vocab_size}: documents begin or end with id {max(ids)}; a model needs "
            f"{max(ids) + 1} or more for it"
        )


def _max_document_bytes(options: argparse.Namespace) -> int | None:
    if options.max_document_megabytes is not None:
        return options.max_document_megabytes << 20
    return None if options.tokenizer == "bytes" else MAX_DOCUMENT_BYTES


def _print_report(output: str, settings: EncodingSettings, report: Report) -> None:
    print(summary(output, report.info))
    print(f"  {_describe_marks(settings, report.info)}")
    num_ids = settings.load_tokenizer().vocab_size
    if settings.vocab_size is not None and num_ids > settings.vocab_size:
        print(
            f"{settings.tokenizer} has ids up to {num_ids - 1}; a document with one from "
            f"{settings.vocab_size} on ends a run like this one",
            file=sys.stderr,
        )
    for source in report.info.sources:
        parts = [f"{source.num_documents:,} documents", f"{source.num_tokens:,} tokens"]
        parts += [f"{count:,} left out: {what}" for what, count in source.left_out.items()]
        if source.num_with_null_bytes:
            parts.append(f"{source.num_with_null_bytes:,} with null bytes (kept)")
        print(f"  {source.name}: {', '.join(parts)}")
    for entry in report.first_left_out:
        place = entry.file if entry.line is None else f"{entry.file}:{entry.line}"
        print(f"left out: {place}: {entry.detail}", file=sys.stderr)
    if len(report.first_left_out) == MAX_LISTED:
        print(f"left out: all of them are in {left_out_list(Path(output))}", file=sys.stderr)


def _describe_marks(settings: EncodingSettings, info: CorpusInfo) -> str:
    marks = settings.load_tokenizer().marks
    begin = f"begin with {marks.begin}" if info.bos_ids else "begin with their text"
    end = f"end with {marks.end}" if info.eod_id is not None else "have no end token"
    special = {
        "parse": "text that spells a special token becomes it",
        "plain": "text that spells a special token stays text",
    }
    return f"documents {begin} and {end}; {special[info.special_tokens]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.preprocess",
        description="Tokenize text into a memory-mapped corpus in Megatron's .bin/.idx format. "
        "A run that was killed goes on when the same command is given again.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_text_arguments(parser)
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin ...")
    parser.add_argument("--tokenizer", required=True, metavar="SPEC", help=TOKENIZER_HELP)
    parser.add_argument(
        "--workers", type=int, default=usable_cpus(), help="worker processes of each rank"
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the tokenizer's end token",
    )
    parser.add_argument(
        "--eod",
        metavar="TOKEN",
        help="end token, in place of the one that the tokenizer's files declare",
    )
    parser.add_argument(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        help="begin every document with the tokenizer's begin token; default: where transformers "
        "does so for a plain text, that is where a tokenizer.json's own post-processor does, or "
        "add_bos_token is set beside another file. Text that begins with it already, as from a "
        "chat template, needs --no-add-bos",
    )
    parser.add_argument(
        "--special-tokens",
        choices=("parse", "plain"),
        help="what becomes of text that spells a special token, as <|im_end|>: that token, or "
        "ordinary ones; default: parse, as transformers does, or plain where the tokenizer's "
        "files set split_special_tokens. Choose plain for text that strangers wrote",
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="refuse ids that a model of this size lacks"
    )
    parser.add_argument(
        "--max-document-megabytes",
        type=int,
        metavar="N",
        help="refuse longer documents; a tokenizer may need 130 times as much memory for one; "
        "default: 16, and with bytes no limit",
    )
    parser.add_argument("--licence", metavar="TEXT", help="a note on the text, kept in PREFIX.json")
    parser.add_argument(
        "--shard-megabytes", type=int, metavar="N", help="input that a kill may cost, per worker"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


command = partial(run_command, main)

if __name__ == "__main__":
    sys.exit(command())
