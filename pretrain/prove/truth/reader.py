"""The samples of every step, read in the order that data_tools/README.md documents.

Written a second time, sample by sample, so that an error of the loader cannot hide in both.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.config import DataConfig, SourceConfig

IGNORED = -100
_WORD = (1 << 64) - 1
_PERIOD = 1 << 16  # samples after which the interleaving of sources repeats
_ID_TYPES = {1: "u1", 4: "<i4", 5: "<i8", 8: "<u2"}
_BYTE_END = 256


class Sample(NamedTuple):
    """One row: `tokens`, `labels` and `segments` [s]."""

    tokens: np.ndarray
    labels: np.ndarray
    segments: np.ndarray


class Corpus(NamedTuple):
    """A source: its ids, and where its documents begin."""

    ids: np.ndarray
    starts: np.ndarray

    def sample(self, begin: int, length: int, *, reset: bool) -> Sample:
        """Ids [begin, begin + length] as input and shifted labels; short at the end: padded."""
        ids = self.ids[begin : begin + length + 1].astype(np.int64)
        positions = np.arange(begin, begin + len(ids))
        segments = np.searchsorted(self.starts, positions, side="right")
        labels = ids[1:].copy()
        if reset:  # the first token of a document has nothing to be predicted from
            labels[segments[1:] != segments[:-1]] = IGNORED
        missing = length + 1 - len(ids)
        return Sample(
            np.pad(ids, (0, missing))[:length],
            np.pad(labels, (0, missing), constant_values=IGNORED),
            np.pad(segments - segments[0], (0, missing), mode="edge")[:length],
        )


def read_corpus(config: DataConfig, source: SourceConfig) -> Corpus:
    """Read a source whole, from local files."""
    if config.kind == "tokens":
        index = Path(f"{source.path}.idx").read_bytes()
        _, _, kind, sequences, bounds = struct.unpack_from("<9sQBQQ", index)
        lengths = np.frombuffer(index, "<i4", sequences, 34).astype(np.int64)
        begins = np.concatenate([[0], lengths.cumsum()])  # in tokens
        documents = np.frombuffer(index, "<i8", bounds, 34 + 12 * sequences)
        ids = np.fromfile(f"{source.path}.bin", _ID_TYPES[kind])
        return Corpus(ids, begins[documents[:-1]])
    files = [p for p in sorted(Path(source.path).rglob("*")) if p.is_file()]
    texts = [text for file in files for text in _byte_documents(file, config)]
    ids = np.concatenate([[*text, _BYTE_END] for text in texts])
    return Corpus(ids, np.concatenate([[0], 1 + np.flatnonzero(ids == _BYTE_END)]))


def _byte_documents(file: Path, config: DataConfig) -> list[bytes]:
    if config.documents == "jsonl":
        key = config.json_key or "text"
        return [json.loads(line)[key].encode() for line in file.read_text().splitlines()]
    if config.documents == "blank_line":  # the last newline between two documents becomes the end
        *rest, last = file.read_bytes().split(b"\n\n")
        return [*(text + b"\n" for text in rest), last]
    return [file.read_bytes()]


class Shuffled:
    """Windows of a source in the order of its epochs."""

    def __init__(self, corpus: Corpus, *, name: str, length: int, seed: int) -> None:
        self.corpus, self._name, self._length, self._seed = corpus, name, length, seed
        self._windows = (len(corpus.ids) - 1) // length

    def begin(self, position: int) -> int:
        """The begin in the corpus of the sample at a position of the order, both in tokens."""
        index, offset = divmod(position, self._length)
        epoch, index = divmod(index, self._windows)
        window = permuted(index, self._windows, key=(self._seed, epoch, self._name))
        return window * self._length + offset


def permuted(index: int, size: int, *, key: tuple[int | str, ...]) -> int:
    """The keyed bijection of [0, size): six Feistel rounds over Z_a x Z_b with cycle walking."""
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=48).digest()
    keys = struct.unpack("<6Q", digest)
    while True:
        left, right = divmod(index, b)
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            left = (left + _hashed(right, even)) % a
            right = (right + _hashed(left, odd)) % b
        index = left * b + right
        if index < size:
            return index


def _hashed(value: int, key: int) -> int:
    """SplitMix's 64-bit finaliser."""
    word = (value * 0x9E3779B97F4A7C15 + key) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def interleaved(weights: Mapping[str, float]) -> list[str]:
    """The source of each sample of a period: n_k evenly spaced slots (2j + 1) / 2 n_k of source k,
    n_k its share of the period by the largest remainder."""
    names, total = sorted(weights), math.fsum(weights.values())
    exact = {name: _PERIOD * weights[name] / total for name in names}
    counts = {name: math.floor(exact[name]) for name in names}
    most = sorted(names, key=lambda name: counts[name] - exact[name])
    for name in most[: _PERIOD - sum(counts.values())]:
        counts[name] += 1
    slots = [((2 * j + 1) / (2 * counts[n]), k, n) for k, n in enumerate(names)
             for j in range(counts[n])]  # fmt: skip
    return [name for _, _, name in sorted(slots)]


class Step(NamedTuple):
    """The data of an optimizer step: sequences, their length, the mix of sources."""

    sequences: int
    length: int
    weights: Mapping[str, float]


def samples_of_steps(
    config: DataConfig, steps: Sequence[Step], *, seed: int
) -> Iterator[list[Sample]]:
    """The rows of one step after the other, in the order of the run."""
    sources = {
        s.name: Shuffled(
            read_corpus(config, s), name=s.name, length=config.sequence_length, seed=seed
        )
        for s in config.train
    }
    positions = dict.fromkeys(sources, 0)
    current: tuple[Mapping[str, float], int] | None = None
    pattern: list[str] = []
    for step in steps:
        if current != (step.weights, step.length):  # a new mix begins; no token is read twice
            current, pattern, number = (step.weights, step.length), interleaved(step.weights), 0
            for name in step.weights:
                positions[name] = -(-positions[name] // step.length) * step.length
        rows = []
        for _ in range(step.sequences):
            source = sources[name := pattern[number % _PERIOD]]
            begin = source.begin(positions[name])
            rows.append(source.corpus.sample(begin, step.length, reset=config.reset_at_documents))
            positions[name] += step.length
            number += 1
        yield rows


def held_out_rows(config: DataConfig, *, max_windows: int | None) -> list[Sample]:
    """The windows of data.validation, disjoint and whole, or `max_windows` evenly spread ones."""
    length = config.sequence_length
    corpora = [read_corpus(config, source) for source in config.validation]
    windows = [(c, begin) for c in corpora for begin in range(0, len(c.ids) - 1, length)]
    number = min(len(windows), max_windows or len(windows))
    chosen = [windows[i * len(windows) // number] for i in range(number)]
    return [c.sample(begin, length, reset=config.reset_at_documents) for c, begin in chosen]
