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
from data_tools.cli import run_command
from data_tools.corpus.corpus_info import CorpusInfo
from data_tools.corpus.indexed import Chunk, IndexedDataset
from data_tools.corpus.indexed_writer import IndexedDatasetWriter, vocab_size_of
from data_tools.corpus.origin import Origin, origin_of, require_tokenizer
from data_tools.errors import DataError
from data_tools.preprocessing.encoding import num_text_bytes
from data_tools.progress import progress_bar
from data_tools.tokenization.tokenizers import Tokenizer

_EXAMPLE = """example:
  python -m data_tools.split data/all --train data/train --validation data/validation --share 0.01
  python -m data_tools.split megatron/corpus --split 969,30,1 \\
      --train data/train --validation data/validation --test data/test
"""
_HASH_RANGE = 1 << 64

Choose = Callable[[Chunk, Sequence[TokenArray]], IntArray]
"""The number of the part that each document of a chunk goes to."""


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
    """Send a `share` of the documents to validation, chosen by a hash of their tokens and the seed.

    Equal documents go the same way, also those of different corpora that were split with one seed.
    Bytes of text, which bits per byte divides by, are counted by decoding. A corpus without a
    sidecar, as Megatron writes them, is split into halves without; with `tokenizer` and `eod`, what
    made it, they get one.

    Raises:
        DataError: `share` is not between 0 and 1, the tokenizer that a sidecar names is not at
            hand, an output exists, or one half would be empty.
    """
    if not 0 < share < 1:
        raise DataError(f"--share {share} must be between 0 and 1: what goes to validation")

    def choose(chunk: Chunk, documents: Sequence[TokenArray]) -> IntArray:
        return np.array([goes_to_validation(d, share=share, seed=seed) for d in documents], int)

    outputs = {"--train": train, "--validation": validation}
    dataset = _open(prefix, outputs)
    origin = origin_of(dataset, tokenizer=tokenizer, eod=eod)
    parts = _Parts(dataset, origin, tokenizer, overwrite=overwrite, command=command)
    return parts.write(outputs, choose, remedy="choose another --share or --seed")


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
    """Cut a corpus in the order of its documents, where Megatron-LM cuts it with `--split ratios`.

    `outputs`: `--train`, `--validation` and `--test` with their prefixes, as far as their ratio is
    not zero. Otherwise as `split`; equal documents may go different ways.

    Raises:
        DataError: `ratios` are not one to three numbers, an output is missing or has nothing to
            hold, or as for `split`.
    """
    dataset = _open(prefix, outputs)
    bounds = split_bounds(ratios, dataset.num_documents)
    names = ("--train", "--validation", "--test")
    for name, (begin, end) in zip(names, bounds, strict=True):
        if (end > begin) != (name in outputs):
            problem = f"{outputs[name]} would be empty" if name in outputs else "is missing"
            remedy = "remove it" if name in outputs else "name it"
            raise DataError(
                f"{name} {problem}: --split {ratios} gives it {end - begin} of "
                f"{dataset.num_documents} documents; {remedy} or change the ratios"
            )
    ends = [end for begin, end in bounds if end > begin]

    def choose(chunk: Chunk, documents: Sequence[TokenArray]) -> IntArray:
        numbers = np.arange(chunk.first_document, chunk.first_document + len(documents))
        return np.searchsorted(ends, numbers, side="right")

    origin = origin_of(dataset, tokenizer=tokenizer, eod=eod)
    parts = _Parts(dataset, origin, tokenizer, overwrite=overwrite, command=command)
    return parts.write(outputs, choose, remedy="change --split")


def goes_to_validation(document: TokenArray, *, share: float, seed: int) -> bool:
    """By a hash of the ids, whatever their dtype."""
    key = seed.to_bytes(8, "little", signed=True)
    data = document.astype("<i8").tobytes()
    digest = hashlib.blake2b(data, digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") < share * _HASH_RANGE


def split_bounds(ratios: str, num_documents: int) -> list[tuple[int, int]]:
    """Begin and end of training, validation and test text, rounded as megatron.core.datasets does.

    Raises:
        DataError: `ratios` are not one to three numbers of 0 or more, one of them above 0.
    """
    try:
        numbers = [float(each) for each in ratios.split(",")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or min(numbers) < 0 or not 0 < sum(numbers) < float("inf"):
        raise DataError(
            f"--split {ratios} must be one to three numbers for training, validation and test "
            "text, such as 969,30,1"
        )
    shares = np.array([*numbers, 0.0, 0.0][:3]) / np.sum(numbers)
    places = [round(float(end) * num_documents) for end in accumulate(shares, initial=0.0)]
    return list(pairwise(places))


def _open(prefix: str, outputs: dict[str, str]) -> IndexedDataset:
    paths = [prefix, *outputs.values()]
    if len({Path(path).absolute() for path in paths}) < len(paths):
        named = " and ".join(f"{name} {path}" for name, path in outputs.items())
        count = {2: "two", 3: "three", 4: "four"}[len(paths)]
        raise DataError(
            f"{prefix}, {named} must be {count} different corpora; choose other outputs"
        )
    return IndexedDataset(prefix)


class _Parts:
    """Writes the documents of a corpus to several ones."""

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
        self, outputs: dict[str, str], choose: Choose, *, remedy: str
    ) -> list[CorpusInfo | None]:
        origin = self._origin
        known = vocab_size_of(self._dataset.dtype) if origin is None else origin.vocab_size
        with ExitStack() as stack:
            writers = [
                stack.enter_context(
                    IndexedDatasetWriter(path, vocab_size=known, overwrite=self._overwrite)
                )
                for path in outputs.values()
            ]
            num_bytes = self._deal(writers, choose)
            # All before any is published: a part that is empty must leave nothing.
            for writer in writers:
                if writer.num_documents == 0:
                    raise DataError(
                        f"{writer.prefix}: no document fell to it of "
                        f"{self._dataset.num_documents}; {remedy}"
                    )
            return [self._finish(*pair) for pair in zip(writers, num_bytes, strict=True)]

    def _deal(self, writers: Sequence[IndexedDatasetWriter], choose: Choose) -> list[int]:
        """Write each document to one of the corpora; the bytes of text of each."""
        done = documents = 0
        num_bytes = [0] * len(writers)
        with progress_bar("splitting", self._dataset.tokens.nbytes) as report:
            for chunk in self._dataset.chunks():
                texts = np.split(chunk.ids, np.cumsum(chunk.lengths)[:-1])
                chosen = choose(chunk, texts)
                for number, writer in enumerate(writers):
                    _add(writer, chunk, chosen == number)
                    if self._decoder is not None and self._must_count(number):
                        of_part = (t for t, c in zip(texts, chosen, strict=True) if c == number)
                        num_bytes[number] += sum(map(self._text_bytes(self._decoder), of_part))
                documents += len(texts)
                done += chunk.ids.nbytes
                report(documents, done)
        if self._dataset.info is not None:
            num_bytes[0] = self._dataset.info.num_bytes - sum(num_bytes)
        return num_bytes

    def _must_count(self, number: int) -> bool:
        """The largest part, training text, is what the others leave of a known total."""
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
            licence=origin.licence,
        )


def _add(writer: IndexedDatasetWriter, chunk: Chunk, chosen: TokenArray) -> None:
    writer.add_documents(chunk.ids[np.repeat(chosen, chunk.lengths)], chunk.lengths[chosen])


def main(arguments: Sequence[str]) -> None:
    """The command line."""
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
                f"--seed {options.seed} has no effect with --split, which goes by the order of the "
                "documents; remove it"
            )
        split_in_order(options.prefix, outputs, ratios=options.split, **common)
    else:
        if list(outputs) != ["--train", "--validation"]:
            raise DataError("--share needs --train and --validation, and no --test; give these two")
        share, seed = options.share, options.seed or 0
        split(options.prefix, options.train, options.validation, share=share, seed=seed, **common)
    for path in outputs.values():
        part = IndexedDataset(path)
        line = f"{path}.bin/.idx: {part.num_documents:,} documents, {part.num_tokens:,} tokens"
        print(line + ("" if part.info is not None else "; no .json, its tokenizer is not known"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.split",
        description="Split a .bin/.idx corpus: by a hash of each document, so that equal documents "
        "never cross, or in order as Megatron-LM does.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prefix", metavar="PREFIX")
    for name in ("--train", "--validation", "--test"):
        parser.add_argument(name, metavar="PREFIX")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--share", type=float, help="of documents, to validation, by their hash")
    choice.add_argument(
        "--split",
        metavar="T,V,TEST",
        help="ratios such as 969,30,1: the same documents that Megatron-LM holds out, in order",
    )
    parser.add_argument("--seed", type=int, help="with --share: another seed, another choice")
    parser.add_argument(
        "--tokenizer",
        metavar="SPEC",
        help="default: the one the corpus names. Of a corpus without a .json, as Megatron's: what "
        "made it; the parts then get a .json",
    )
    parser.add_argument("--eod", metavar="TOKEN", help="and what ends its documents")
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    return parser


command = partial(run_command, main)

if __name__ == "__main__":
    sys.exit(command())
