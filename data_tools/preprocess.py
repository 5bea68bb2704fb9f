"""Tokenize text into a .bin/.idx corpus: `python -m data_tools.preprocess --help`.

The input is cut into shards (inputs.py, shards.py). Every rank encodes its share of them into
OUTPUT.work; rank 0 joins all finished shards and publishes the corpus.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from data_tools.cli import add_text_arguments, program, refuse_below, run_command, usable_cpus
from data_tools.corpus.corpus_info import CorpusInfo, left_out_list
from data_tools.errors import DataError
from data_tools.preprocessing.documents import MAX_DOCUMENT_BYTES
from data_tools.preprocessing.encoding import VERIFY_SHARE, EncodingSettings
from data_tools.preprocessing.inputs import (
    Source,
    cut_pieces,
    find_inputs,
    total_size,
    warn_of_unread,
)
from data_tools.preprocessing.join_shards import (
    MAX_LISTED,
    PreprocessJob,
    PreprocessReport,
    join_shards,
    summary,
)
from data_tools.preprocessing.multi_node import Communicator, SingleRank, find_communicator
from data_tools.preprocessing.resume_folder import ResumeFolder, ResumeSettings
from data_tools.preprocessing.shards import (
    Shard,
    encode_shard,
    plan_shards,
    read_report,
    shard_bytes,
)
from data_tools.preprocessing.workers import run_tasks
from data_tools.progress import progress_bar
from data_tools.tokenization.hugging_face_files import HuggingFaceTokenizer
from data_tools.tokenization.tokenizers import TOKENIZER_HELP

_EXAMPLE = """example:
  %(prog)s --input corpus/ more.jsonl.zst --output data/train \\
      --tokenizer data/tokenizer.model --workers 8
  srun --nodes 4 python -m data_tools.preprocess ...   # on many machines; or mpirun, with mpi4py
"""

# A process takes as long to start as to encode about 50 MB, and threads wait for one another.
_PROCESSES_FROM_BYTES = 256 << 20


def preprocess(job: PreprocessJob, *, num_workers: int = 1) -> PreprocessReport:
    """Tokenize documents into OUTPUT.bin, .idx and .json on a single rank.

    Raises:
        DataError: see `preprocess_as_rank`.
    """
    report = preprocess_as_rank(SingleRank(), job, num_workers=num_workers)
    assert report is not None, "rank 0 returns one"
    return report


def preprocess_as_rank(
    communicator: Communicator, job: PreprocessJob, *, num_workers: int
) -> PreprocessReport | None:
    """Encode this rank's share of a job; rank 0 publishes the output and returns the report.

    The output does not depend on the number of workers and ranks. A killed run resumes from its
    finished shards.

    Raises:
        DataError: an input or the tokenizer is unusable, or the output exists. No output is
            written then.
    """
    folder = ResumeFolder(Path(job.output))
    sources: list[Source] = []
    shards: list[Shard] = []

    def prepare() -> None:
        sources.extend(find_inputs(job.inputs))
        shards.extend(_plan(job, sources))
        folder.plan(_resume_settings(job.settings), shards)
        if communicator.rank == 0:
            folder.claim(overwrite=job.overwrite)

    try:
        # Share failures with all ranks, so that none waits for one that has failed.
        failures = communicator.gather("begin", _error_message(prepare), last=False)
        if not any(failures) and not folder.is_published():
            share = _shards_of_rank(shards, communicator)
            work = partial(_encode, job, share, folder, num_workers)
            failures = [_error_message(work)]
        failures = communicator.gather("end", next(filter(None, failures), ""), last=True)
        if failure := next(filter(None, failures), None):
            num_finished = folder.num_finished()
            hint = _resume_hint(num_finished, len(shards), folder) if num_finished else ""
            raise DataError(failure + hint)
        return join_shards(job, sources, shards, folder) if communicator.rank == 0 else None
    finally:
        folder.release()


def _plan(job: PreprocessJob, sources: Sequence[Source]) -> Iterator[Shard]:
    num_bytes = job.shard_bytes or shard_bytes(total_size(sources))
    pieces = cut_pieces(sources, piece_bytes=num_bytes, json_key=job.settings.json_key)
    return plan_shards(pieces, num_bytes=num_bytes)


def _resume_settings(settings: EncodingSettings) -> ResumeSettings:
    """Return the settings that the contents of a shard depend on besides its pieces."""
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


def _shards_of_rank(shards: Sequence[Shard], communicator: Communicator) -> list[Shard]:
    """Assign shards to ranks round robin, the largest first.

    Finished shards are assigned as well: ranks may not see the same latest files.
    """
    by_size = sorted(shards, key=lambda shard: shard.size, reverse=True)
    return by_size[communicator.rank :: communicator.size]


def _error_message(work: Callable[[], None]) -> str:
    """Run `work` and return its error message, empty on success."""
    try:
        work()
    except (DataError, OSError) as error:
        return str(error)
    return ""


def _resume_hint(num_finished: int, total: int, folder: ResumeFolder) -> str:
    return (
        f" ({num_finished} of {total} shards are finished and kept in {folder.path} for the next "
        "run)"
    )


def _encode(
    job: PreprocessJob, share: Sequence[Shard], folder: ResumeFolder, num_workers: int
) -> None:
    left = [shard for shard in share if read_report(folder.path, shard) is None]
    if len(left) < len(share):
        print(f"{len(share) - len(left)} of {len(share)} shards were finished before")
    encode = partial(encode_shard, settings=job.settings, folder=folder.path)
    size = sum(shard.size for shard in left)
    with progress_bar("tokenizing", size) as report:
        run_tasks(
            encode,
            left,
            num_workers=min(num_workers, max(1, len(left))),
            report=report,
            in_threads=size < _PROCESSES_FROM_BYTES and job.settings.encodes_in_threads(),
        )


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    # Parallelism comes from the workers; tokenizer threads would compete for the same CPUs.
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
        encoder=options.encoder,
        verify_share=options.verify_share,
    )
    _check_options(options, settings)
    job = PreprocessJob(
        inputs=options.input,
        output=options.output,
        settings=settings,
        overwrite=options.overwrite,
        license=options.license,
        command=shlex.join(["python", "-m", "data_tools.preprocess", *arguments]),
        shard_bytes=options.shard_megabytes and options.shard_megabytes << 20,
    )
    rendezvous_folder = ResumeFolder(Path(options.output)).path.joinpath
    communicator = find_communicator(rendezvous_folder)
    if communicator.rank == 0:
        warn_of_unread(job.inputs)
    report = preprocess_as_rank(communicator, job, num_workers=options.workers)
    if report is not None:
        _print_report(options.output, settings, report)


def _check_options(options: argparse.Namespace, settings: EncodingSettings) -> None:
    refuse_below(1, options, "workers", "shard_megabytes", "vocab_size", "max_document_megabytes")
    if not 0 <= options.verify_share <= 1:
        raise DataError(f"--verify-share {options.verify_share} must be in [0, 1]; correct it")
    if options.eod is not None and not options.append_eod:
        raise DataError(f"--eod {options.eod} has no effect with --no-append-eod; remove one")
    if options.vocab_size is not None:
        _check_boundary_tokens(settings, options.vocab_size)


def _check_boundary_tokens(settings: EncodingSettings, vocab_size: int) -> None:
    """Check begin and end tokens, which all documents have; other ids are checked as they occur."""
    text = settings.text_rules()
    ids = [*(text.bos_ids or ()), *([] if text.eod_id is None else [text.eod_id])]
    if max(ids, default=0) >= vocab_size:
        raise DataError(
            f"--vocab-size {vocab_size}: documents begin or end with id {max(ids)}, for which a "
            f"model needs {max(ids) + 1} or more; raise it"
        )


def _max_document_bytes(options: argparse.Namespace) -> int | None:
    if options.max_document_megabytes is not None:
        return options.max_document_megabytes << 20
    return None if options.tokenizer == "bytes" else MAX_DOCUMENT_BYTES


def _print_report(output: str, settings: EncodingSettings, report: PreprocessReport) -> None:
    print(summary(output, report.info))
    print(f"  {_describe_boundary_tokens(settings, report.info)}")
    tokenizer = settings.load_tokenizer()
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.encoder != "tokenizers":
        share = f"{100 * settings.verify_share:g}"
        print(f"  encoded by {tokenizer.encoder}; {share} % of documents compared with tokenizers")
    num_ids = tokenizer.vocab_size
    if settings.vocab_size is not None and num_ids > settings.vocab_size:
        print(
            f"{settings.tokenizer} has ids up to {num_ids - 1}; a document with an id of "
            f"{settings.vocab_size} or more would have ended this run",
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


def _describe_boundary_tokens(settings: EncodingSettings, info: CorpusInfo) -> str:
    tokens = settings.load_tokenizer().boundary_tokens
    begin = f"begin with {tokens.bos}" if info.bos_ids else "begin with their text"
    end = f"end with {tokens.eod}" if info.eod_id is not None else "have no end token"
    special = {
        "parse": "text that spells a special token becomes it",
        "plain": "text that spells a special token stays text",
    }
    return f"documents {begin} and {end}; {special[info.special_tokens]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("python -m data_tools.preprocess"),
        usage="%(prog)s --input PATH ... --output PREFIX --tokenizer SPEC [option ...]",
        description="Tokenize text into a memory-mapped corpus in Megatron's .bin/.idx format.\n"
        "A killed run resumes when the same command is run again.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_text_arguments(parser)
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin ...")
    parser.add_argument("--tokenizer", required=True, metavar="SPEC", help=TOKENIZER_HELP)
    parser.add_argument(
        "--workers",
        type=int,
        default=usable_cpus(),
        metavar="N",
        help="workers per rank (default: the cores, %(default)s)",
    )
    _add_token_arguments(parser)
    parser.add_argument(
        "--max-document-megabytes",
        type=int,
        metavar="N",
        help="refuse longer documents (default: 16, and no limit with bytes)",
    )
    parser.add_argument(
        "--encoder",
        choices=("gigatoken", "tiktoken", "tokenizers"),
        metavar="NAME",
        help="gigatoken, tiktoken or tokenizers (default: the first with the same ids)",
    )
    parser.add_argument(
        "--verify-share",
        type=float,
        default=VERIFY_SHARE,
        metavar="SHARE",
        help="of documents compared with tokenizers (default: %(default)s)",
    )
    parser.add_argument(
        "--license",
        "--licence",  # the spelling of earlier versions
        metavar="TEXT",
        help="of the text, for PREFIX.json",
    )
    parser.add_argument(
        "--shard-megabytes",
        type=int,
        metavar="N",
        help="input per shard, which a kill loses at most",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


def _add_token_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the end token (default: yes)",
    )
    parser.add_argument(
        "--eod",
        metavar="TOKEN",
        help="end token (default: that of the tokenizer's files)",
    )
    parser.add_argument(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        help="begin every document with the begin token (default: as transformers does); text "
        "that has one, as from a chat template, needs --no-add-bos",
    )
    parser.add_argument(
        "--special-tokens",
        choices=("parse", "plain"),
        help="text that spells a token such as <|im_end|> becomes it, or stays text, as untrusted "
        "text should (default: as transformers does, mostly parse)",
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="refuse ids of N or more (model.vocab_size)"
    )


command = partial(run_command, main)

if __name__ == "__main__":
    sys.exit(command())
