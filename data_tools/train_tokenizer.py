"""Train a SentencePiece tokenizer: `python -m data_tools.train_tokenizer --help`."""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from data_tools.cli import add_text_arguments, program, refuse_below, run_command
from data_tools.errors import DataError
from data_tools.files import replace_atomically
from data_tools.preprocessing.documents import BadDocumentError, DocumentReader, extract_text
from data_tools.preprocessing.inputs import cut_pieces, find_inputs, total_size, warn_of_unread
from data_tools.progress import progress_bar
from data_tools.tokenization.tokenizers import SentencePieceTokenizer

_EXAMPLE = """example:
  %(prog)s --input corpus/ --output data/tokenizer.model \\
      --vocab-size 32000
"""
EOD_PIECE = "</s>"
_MAX_LINE = 4096  # characters passed to the trainer at once
_LEAST = 300  # --vocab-size that holds the bytes and the characters of a small alphabet
_HASH_RANGE = 1 << 64


def train_tokenizer(
    inputs: Sequence[str],
    output: str,
    *,
    vocab_size: int,
    json_key: str = "text",
    max_megabytes: int = 200,
    skip_bad_lines: bool = False,
    overwrite: bool = False,
) -> SentencePieceTokenizer:
    """Train a BPE model with byte fallback; training is deterministic.

    Decoding restores the encoded text exactly, including line ends and indentation (except U+2581,
    SentencePiece's symbol for a space, which becomes one). Id 0 is the unknown piece and never
    occurs, id 1 ends a document. Inputs larger than `max_megabytes` are sampled to about that size,
    by a hash of each document.

    Raises:
        DataError: the output's suffix is not .model, it exists, an input is unusable, or the text
            is too short for `vocab_size` pieces.
    """
    path = Path(output)
    if path.suffix != ".model":
        raise DataError(f"--output {output} must end in .model, which identifies its kind; add it")
    if path.exists() and not overwrite:
        raise DataError(f"{output} exists; choose another output or pass --overwrite to replace it")
    sources = find_inputs(inputs)
    pieces = cut_pieces(sources, piece_bytes=max(1, total_size(sources)), json_key=json_key)
    reader = DocumentReader(pieces, json_key=json_key)
    keep = min(1.0, max_megabytes * 1e6 / max(1, reader.total_bytes))
    lines = _lines(reader, json_key=json_key, keep=keep, skip_bad_lines=skip_bad_lines)
    with replace_atomically(path) as file:
        file.write(_train(lines, vocab_size))
    return SentencePieceTokenizer(path, eod=None, special_tokens="plain")


def _train(lines: Iterator[str], vocab_size: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            max_sentence_length=4 * _MAX_LINE,  # counted in bytes
            unk_id=0,
            eos_id=1,
            eos_piece=EOD_PIECE,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip()  # without the C++ source location
        remedy = "pass more text"
        if vocab_size != _LEAST:
            remedy += f", or {'lower' if vocab_size > _LEAST else 'raise'} it to {_LEAST}"
        raise DataError(
            f"--vocab-size {vocab_size} cannot be trained on this text ({reason}); {remedy}"
        ) from error
    return model.getvalue()


def _lines(
    reader: DocumentReader, *, json_key: str, keep: float, skip_bad_lines: bool = False
) -> Iterator[str]:
    """Yield the lines of a share `keep` of the documents, cut to at most 4096 characters."""
    with progress_bar("reading", reader.total_bytes) as report:
        for number, document in enumerate(reader, start=1):
            report(number, reader.bytes_read)
            digest = hashlib.blake2b(document.data, digest_size=8).digest()
            if int.from_bytes(digest, "little") >= keep * _HASH_RANGE:
                continue
            try:
                text = extract_text(document, json_key=json_key)
            except BadDocumentError:
                if not skip_bad_lines:
                    raise
                continue
            for line in text.split("\n"):
                for begin in range(0, len(line), _MAX_LINE):
                    yield line[begin : begin + _MAX_LINE]


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    refuse_below(1, options, "vocab_size", "max_megabytes")
    warn_of_unread(options.input)
    tokenizer = train_tokenizer(
        options.input,
        options.output,
        vocab_size=options.vocab_size,
        json_key=options.json_key,
        max_megabytes=options.max_megabytes,
        skip_bad_lines=options.on_bad_line == "skip",
        overwrite=options.overwrite,
    )
    print(
        f"{options.output}: {tokenizer.vocab_size:,} pieces, {EOD_PIECE} (id {tokenizer.eod_id}) "
        "ends a document"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("python -m data_tools.train_tokenizer"),
        description="Train a SentencePiece tokenizer (BPE with byte fallback).",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_text_arguments(parser)
    parser.add_argument("--output", required=True, metavar="PREFIX.model", help="a new file")
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="pieces, 300 or more"
    )
    parser.add_argument(
        "--max-megabytes",
        type=int,
        default=200,
        metavar="N",
        help="most text to train on (default: 200)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser


command = partial(run_command, main)

if __name__ == "__main__":
    sys.exit(command())
