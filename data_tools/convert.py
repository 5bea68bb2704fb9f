"""Convert a tokenised corpus between formats: `python -m data_tools.convert --help`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial

from data_tools.cli import program, run_command
from data_tools.formats.blocks import ReadOptions, WriteOptions
from data_tools.formats.copying import Copied, Copy, copy_corpus
from data_tools.formats.kinds import KINDS

RAW_DTYPES = ("uint8", "uint16", "uint32", "uint64", "int32", "int64")
_EXAMPLE = """example:
  %(prog)s --from nanogpt --to megatron owt/train.bin --eod 50256 --output train
  %(prog)s --from megatron --to llmc data/train --output shards
"""


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    copied = copy_corpus(
        Copy(
            source_kind=options.source_kind,
            target_kind=options.target_kind,
            inputs=options.inputs,
            output=options.output,
            read=ReadOptions(
                eod=options.eod,
                bos=options.bos,
                dtype=options.dtype,
                column=options.column,
                no_boundaries=options.no_boundaries,
            ),
            write=WriteOptions(
                overwrite=options.overwrite,
                column=options.column,
                shard_tokens=options.shard_tokens,
            ),
            vocab_size=options.vocab_size,
            tokenizer=options.tokenizer,
            drop_empty=options.drop_empty,
            in_place=options.in_place,
            command=shlex.join(["python", "-m", "data_tools.convert", *arguments]),
        )
    )
    print(_summary(options.output, options.target_kind, copied))


def _summary(output: str, kind: str, copied: Copied) -> str:
    manifest = copied.manifest
    line = (
        f"{output} ({kind}): {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens "
        f"({manifest.dtype})"
    )
    if copied.num_empty:
        line += f"; {copied.num_empty:,} empty documents left out"
    return line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("python -m data_tools.convert"),
        description="Convert a tokenised corpus between formats. Documents, ids and their order\n"
        "are kept, or the corpus is refused; the same command resumes a killed one.\n"
        "data_tools/formats/README.md lists the formats.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = ", ".join(KINDS)
    for name, dest in (("--from", "source_kind"), ("--to", "target_kind")):
        parser.add_argument(
            name, dest=dest, required=True, choices=KINDS, metavar="KIND", help=f"one of {kinds}"
        )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, a folder or a prefix")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="a new corpus")
    parser.add_argument("--eod", type=int, metavar="ID", help="id that ends every document")
    parser.add_argument("--bos", type=int, metavar="ID", help="id that begins every document")
    parser.add_argument(
        "--no-boundaries",
        action="store_true",
        help="read or write a format that records no documents as one document",
    )
    parser.add_argument("--dtype", choices=RAW_DTYPES, help="of ids in raw bytes")
    parser.add_argument(
        "--column", metavar="NAME", help="column with the ids (default: input_ids, in MDS tokens)"
    )
    parser.add_argument("--vocab-size", type=int, metavar="N", help="every id must be below N")
    parser.add_argument(
        "--tokenizer", metavar="SPEC", help="what made the ids; --to megatron then writes a .json"
    )
    parser.add_argument(
        "--in-place", action="store_true", help="write an index alone; .bin links to the input"
    )
    parser.add_argument("--drop-empty", action="store_true", help="leave out empty documents")
    parser.add_argument(
        "--shard-tokens", type=int, metavar="N", help="tokens of a file, where there are several"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


command = partial(run_command, main)

if __name__ == "__main__":
    sys.exit(command())
