"""Split a .bin/.idx corpus into training and held-out text: `python -m data_tools.split --help`."""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.arrays import IntArray, TokenArray
from data_tools.cli import program, run_command
from data_tools.corpus.corpus_info import CorpusInfo
from data_tools.corpus.indexed import Chunk, IndexedDataset
from data_tools.corpus.indexed_writer import IndexedDatasetWriter, vocab_size_of
from data_tools.corpus.origin import Origin, num_text_bytes, origin_of, require_tokenizer
from data_tools.errors import DataError
from data_tools.progress import progress_bar
from data_tools.tokenization.tokenizers import Tokenizer

_EXAMPLE = """example:
  %(prog)s data/all --train data/train --validation data/validation --share 0.01
  %(prog)s megatron/corpus --split 969,30,1 \\
      --train data/train --validation data/validation --test data/test
"""
_HASH_RANGE = 1 << 64

Assign = Callable[[Chunk, Sequence[TokenArray]], IntArray]
"""Returns the number of the output that each document of a chunk goes to."""


def split(
    prefix: str,
    train: str,
    validation: str,
    *,
    share: float,
    seed: int = 0,
    tokenizer: str | None = None,
    eod: str | None = None,
    overwrite: bool = False,
    command: str = "",
) -> list[CorpusInfo | None]:
    """Hold out a `share` of the documents for validation, by a hash of their tokens and the seed.

    Equal documents go to the same split, even in different corpora split with the same seed. The
    bytes of text, the denominator of bits per byte, are counted by decoding. The splits of a corpus
    without a sidecar, such as Megatron's, have one only if its `tokenizer` (and `eod`) is given.

    Raises:
        DataError: `share` is not between 0 and 1, the tokenizer named in the sidecar is not
            available, an output exists, or a split would be empty.
    """
    if not 0 < share < 1:
        raise DataError(
            f"--share {share} must be between 0 and 1; pass the share of documents to hold out"
        )

    def assign(chunk: Chunk, documents: Sequence[TokenArray]) -> IntArray:
        return np.array([is_held_out(d, share=share, seed=seed) for d in documents], int)

    outputs = {"--train": train, "--validation": validation}
    dataset = _open(prefix, outputs)
    origin = origin_of(dataset, tokenizer=tokenizer, eod=eod)
    writer = _SplitWriter(dataset, origin, tokenizer, overwrite=overwrite, command=command)
    return writer.write(outputs, assign, remedy="choose another --share or --seed")


def split_in_order(
    prefix: str,
    outputs: dict[str, str],
    *,
    ratios: str,
    tokenizer: str | None = None,
    eod: str | None = None,
    overwrite: bool = False,
    command: str = "",
) -> list[CorpusInfo | None]:
    """Split a corpus in document order, at the same boundaries as Megatron-LM's `--split ratios`.

    `outputs` maps `--train`, `--validation` and `--test` to prefixes, for all nonzero ratios.
    Otherwise as `split`, except that equal documents may go to different splits.

    Raises:
        DataError: `ratios` are not one to three numbers, an output is missing or would be empty,
            or as for `split`.
    """
    dataset = _open(prefix, outputs)
    bounds = split_bounds(ratios, dataset.num_documents)
    names = ("--train", "--validation", "--test")
    for name, (begin, end) in zip(names, bounds, strict=True):
        if (end > begin) != (name in outputs):
            problem = f"{outputs[name]} would be empty" if name in outputs else "is missing"
            remedy = "remove it" if name in outputs else f"pass {name}"
            raise DataError(
                f"{name} {problem}: --split {ratios} gives it {end - begin} of "
                f"{dataset.num_documents} documents; {remedy} or change the ratios"
            )
    ends = [end for begin, end in bounds if end > begin]

    def assign(chunk: Chunk, documents: Sequence[TokenArray]) -> IntArray:
        numbers = np.arange(chunk.first_document, chunk.first_document + len(documents))
        return np.searchsorted(ends, numbers, side="right")

    origin = origin_of(dataset, tokenizer=tokenizer, eod=eod)
    writer = _SplitWriter(dataset, origin, tokenizer, overwrite=overwrite, command=command)
    return writer.write(outputs, assign, remedy="change --split")


def is_held_out(document: TokenArray, *, share: float, seed: int) -> bool:
    """Return whether a document is held out, by a hash of its ids that ignores their dtype."""
    key = seed.to_bytes(8, "little", signed=True)
    data = document.astype("<i8").tobytes()
    digest = hashlib.blake2b(data, digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") < share * _HASH_RANGE


def split_bounds(ratios: str, num_documents: int) -> list[tuple[int, int]]:
    """Return the document ranges of the three splits, rounded as in megatron.core.datasets.

    Raises:
        DataError: `ratios` are not one to three nonnegative numbers, at least one of them positive.
    """
    try:
        numbers = [float(each) for each in ratios.split(",")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or min(numbers) < 0 or not 0 < sum(numbers) < float("inf"):
        raise DataError(
            f"--split {ratios} must be one to three numbers for training, validation and test "
            "text; pass 969,30,1, for example"
        )
    shares = np.array([*numbers, 0.0, 0.0][:3]) / np.sum(numbers)
    bounds = [round(float(end) * num_documents) for end in accumulate(shares, initial=0.0)]
    return list(pairwise(bounds))


def _open(prefix: str, outputs: dict[str, str]) -> IndexedDataset:
    paths = [prefix, *outputs.values()]
    if len({Path(path).absolute() for path in paths}) < len(paths):
        named = " and ".join(f"{name} {path}" for name, path in outputs.items())
        count = {2: "two", 3: "three", 4: "four"}[len(paths)]
        raise DataError(
            f"{prefix}, {named} must be {count} different corpora; choose other outputs"
        )
    return IndexedDataset(prefix)


class _SplitWriter:
    """Distributes the documents of a corpus over several outputs."""

    def __init__(
        self,
        dataset: IndexedDataset,
        origin: Origin | None,
        tokenizer: str | None,
        *,
        overwrite: bool,
        command: str,
    ) -> None:
        self._dataset = dataset
        self._origin = origin
        self._decoder = None if origin is None else require_tokenizer(dataset, tokenizer)
        self._overwrite = overwrite
        self._command = command

    def write(
        self, outputs: dict[str, str], assign: Assign, *, remedy: str
    ) -> list[CorpusInfo | None]:
        origin = self._origin
        vocab_size = vocab_size_of(self._dataset.dtype) if origin is None else origin.vocab_size
        with ExitStack() as stack:
            writers = [
                stack.enter_context(
                    IndexedDatasetWriter(path, vocab_size=vocab_size, overwrite=self._overwrite)
                )
                for path in outputs.values()
            ]
            num_bytes = self._distribute(writers, assign)
            # Check all before publishing any: an empty output must leave no files at all.
            for writer in writers:
                if writer.num_documents == 0:
                    raise DataError(
                        f"{writer.prefix}: it would get none of the "
                        f"{self._dataset.num_documents} documents; {remedy}"
                    )
            return [self._finish(*pair) for pair in zip(writers, num_bytes, strict=True)]

    def _distribute(self, writers: Sequence[IndexedDatasetWriter], assign: Assign) -> list[int]:
        """Write each document to its output, and return the bytes of text of each output."""
        done = documents = 0
        num_bytes = [0] * len(writers)
        with progress_bar("splitting", self._dataset.tokens.nbytes) as report:
            for chunk in self._dataset.chunks():
                texts = np.split(chunk.ids, np.cumsum(chunk.lengths)[:-1])
                numbers = assign(chunk, texts)
                for number, writer in enumerate(writers):
                    _add(writer, chunk, numbers == number)
                    if self._decoder is not None and self._must_count(number):
                        own = (t for t, n in zip(texts, numbers, strict=True) if n == number)
                        num_bytes[number] += sum(map(self._text_bytes(self._decoder), own))
                documents += len(texts)
                done += chunk.ids.nbytes
                report(documents, done)
        if self._dataset.info is not None:
            num_bytes[0] = self._dataset.info.num_bytes - sum(num_bytes)
        return num_bytes

    def _must_count(self, number: int) -> bool:
        """Return whether to count the bytes of an output; training text gets the remainder."""
        return number > 0 or self._dataset.info is None

    def _text_bytes(self, decoder: Tokenizer) -> Callable[[npt.NDArray[np.integer]], int]:
        assert self._origin is not None, "there is a decoder"
        text = self._origin.text
        return lambda ids: num_text_bytes(decoder, ids, text)

    def _finish(self, writer: IndexedDatasetWriter, num_bytes: int) -> CorpusInfo | None:
        origin = self._origin
        if origin is None:
            writer.finish_without_info()
            return None
        return writer.finish(
            tokenizer=origin.tokenizer,
            tokenizer_fingerprint=origin.tokenizer_fingerprint,
            **origin.text._asdict(),
            num_bytes=num_bytes,
            command=self._command,
            license=origin.license,
        )


def _add(writer: IndexedDatasetWriter, chunk: Chunk, mask: TokenArray) -> None:
    writer.add_documents(chunk.ids[np.repeat(mask, chunk.lengths)], chunk.lengths[mask])


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    outputs = {"--train": options.train, "--validation": options.validation, "--test": options.test}
    outputs = {name: path for name, path in outputs.items() if path is not None}
    common = {
        "tokenizer": options.tokenizer,
        "eod": options.eod,
        "overwrite": options.overwrite,
        "command": shlex.join(["python", "-m", "data_tools.split", *arguments]),
    }
    if options.split is not None:
        if options.seed is not None:
            raise DataError(
                f"--seed {options.seed} has no effect with --split, which splits in document "
                "order; remove it"
            )
        split_in_order(options.prefix, outputs, ratios=options.split, **common)
    else:
        if list(outputs) != ["--train", "--validation"]:
            raise DataError("--share needs --train and --validation, and no --test; pass these two")
        share, seed = options.share, options.seed or 0
        split(options.prefix, options.train, options.validation, share=share, seed=seed, **common)
    for path in outputs.values():
        part = IndexedDataset(path)
        line = f"{path}.bin/.idx: {part.num_documents:,} documents, {part.num_tokens:,} tokens"
        print(line + ("" if part.info is not None else "; no .json, its tokenizer is unknown"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("python -m data_tools.split"),
        description="Split a .bin/.idx corpus: by a hash of each document, so that equal\n"
        "documents go to the same split, or in order as Megatron-LM does.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prefix", metavar="PREFIX", help="the corpus, without .bin")
    for name in ("--train", "--validation", "--test"):
        parser.add_argument(name, metavar="PREFIX", help="write this part of it")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--share", type=float, help="share of documents held out, by their hash")
    choice.add_argument(
        "--split",
        metavar="T,V,TEST",
        help="ratios such as 969,30,1: split in order, at the boundaries of Megatron-LM",
    )
    parser.add_argument("--seed", type=int, help="seed of the hash of --share (default: 0)")
    parser.add_argument(
        "--tokenizer",
        metavar="SPEC",
        help="tokenizer of the corpus; default: the one in its .json. For a corpus without one, "
        "such as Megatron's, the outputs then get a .json",
    )
    parser.add_argument("--eod", metavar="TOKEN", help="end token of a corpus without a .json")
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    return parser


command = partial(run_command, main)

if __name__ == "__main__":
    sys.exit(command())
