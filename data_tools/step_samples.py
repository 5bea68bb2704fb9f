"""The samples of the steps of a run: their source, documents and text, from its run directory."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.config import DataConfig
from data_tools.corpus.corpus_info import read_info
from data_tools.corpus.origin import recorded_tokenizer
from data_tools.corpus.remote import local_prefix
from data_tools.corpus.token_stream import DocumentOrigin, Span, TokenStream
from data_tools.errors import DataError, NoSuchFileError
from data_tools.loading.sources import open_sources
from data_tools.sampling.blend import Blend
from data_tools.sampling.datasets import build_datasets
from data_tools.sampling.order_record import ORDER_NAME, OrderRecord, read_records
from data_tools.sampling.token_dataset import SampleLocations, TokenDataset
from data_tools.tokenization.tokenizers import Tokenizer, load_tokenizer, tokenizer_fingerprint

_STEP_NAME = re.compile(r"step_(\d{1,15})")


class Piece(NamedTuple):
    """The part of one document inside a sample.

    `begin`, `end`: tokens of the document, [begin, end). `ids`: what the model saw there, after
    fill-in-the-middle. `text`: their text; None without a tokenizer.
    """

    origin: DocumentOrigin
    begin: int
    end: int
    ids: list[int]
    text: str | None


class Sample(NamedTuple):
    """One sample of a step: s + 1 tokens, the last of which is only a label.

    `number`: of the run, from 0. `token`: offset of its first token in the source.
    """

    step: int
    number: int
    source: str
    epoch: int
    token: int
    is_skipped: bool
    pieces: list[Piece]

    @property
    def ids(self) -> list[int]:
        """All tokens of the sample."""
        return [token for piece in self.pieces for token in piece.ids]


class StepSamples:
    """The samples of a run's steps, recomputed from RUN/data_order.jsonl and the corpora.

    Args:
        moved: Where sources are now, by name; others are where the run read them.
        tokenizer: Specification of the tokenizer; None: that of the run, or of the corpora.

    Raises:
        DataError: the directory is not that of a run, or does not record the order of samples.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        moved: Mapping[str, str] | None = None,
        tokenizer: str | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._records = read_records(run_dir)
        self._moved, self._tokenizer = dict(moved or {}), tokenizer
        if not (run_dir / "config.yaml").is_file():
            raise DataError(
                f"{run_dir}: no config.yaml in it, so it is not the directory of a run that has "
                "started; pass run_dir of the configuration"
            )
        if not self._records:
            raise DataError(
                f"{run_dir}: no {ORDER_NAME} in it, because a version without it trained the run; "
                "start the run again, and the order of its samples is recorded from there on"
            )
        known = {s.name for record in self._records for s in record.data.train}
        for name in self._moved.keys() - known:
            raise DataError(
                f"--source {name}={self._moved[name]}: the run has no source {name}; choose from "
                f"{', '.join(sorted(known))}"
            )

    def check_steps(self, first: int, last: int, *, planned: bool = False) -> None:
        """Check that the run has taken the steps, or with `planned` that it plans to.

        Raises:
            DataError: it has not, or a version that recorded no order of samples took them.
        """
        begin = self._records[0].after_step
        if first <= begin:
            raise DataError(
                f"--steps {first}:{last}: {self._run_dir} records the order of samples from step "
                f"{begin + 1} on, earlier steps were trained by a version that did not; choose "
                "later steps"
            )
        end = self._records[-1].last_step if planned else self._steps_taken()
        if last > end:
            what = "plans" if planned else "has logged or saved"
            hint = "" if planned else "; --planned also shows steps that are not logged yet"
            raise DataError(
                f"--steps {first}:{last}: {self._run_dir} {what} steps up to {end}; choose "
                f"earlier steps{hint}"
            )

    def read(self, first: int, last: int) -> Iterator[Sample]:
        """Yield the samples of steps [first, last] in order, at any layout of the run.

        Raises:
            DataError: a source is missing, or is not the corpus that the run was trained on.
        """
        steps = range(first, last + 1)
        for record, group in itertools.groupby(steps, key=self._record_of):
            reader = _Reader(record, self._run_dir, moved=self._moved, tokenizer=self._tokenizer)
            for step in group:
                yield from reader.samples(step)

    def _record_of(self, step: int) -> OrderRecord:
        return next(each for each in reversed(self._records) if each.after_step < step)

    def _steps_taken(self) -> int:
        saved = [
            int(found[1])
            for path in (self._run_dir / "checkpoints").glob("step_*")
            if (found := _STEP_NAME.fullmatch(path.name))
        ]
        return max([self._records[-1].seen_step, *saved, *self._logged_steps()])

    def _logged_steps(self) -> Iterator[int]:
        path = self._run_dir / "metrics.jsonl"
        if not path.is_file():
            return
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    step = json.loads(line).get("step")
                except (ValueError, AttributeError):
                    continue  # truncated by a crash
                if isinstance(step, int):
                    yield step


class _Reader:
    """Samples of the steps of one record."""

    def __init__(
        self,
        record: OrderRecord,
        run_dir: Path,
        *,
        moved: Mapping[str, str],
        tokenizer: str | None,
    ) -> None:
        self._record = record
        config = _with_paths(record.data, moved, tokenizer)
        if tokenizer is not None:
            _check_given(tokenizer, config)
        self._datasets = _open(record, config, run_dir)
        self._tokenizer = _tokenizer_of(config)
        self._first_samples = [each.first_sample for each in record.mix]
        self._blends = [
            Blend(each.weights, start_sample=each.first_sample, base=each.base)
            for each in record.mix
        ]

    def samples(self, step: int) -> Iterator[Sample]:
        """Yield the samples of a step."""
        is_skipped = self._record.skips(step)
        for number in self._record.samples_of(step):
            index = int(np.searchsorted(self._first_samples, number, side="right")) - 1
            blend, length = self._blends[index], self._record.mix[index].sequence_length
            (source,), (sample,) = blend.look_up(np.array([number]))
            name = blend.names[source]
            dataset = self._datasets[name]
            location = dataset.locate(np.array([sample * length]))
            token, epoch = int(location.starts[0]), int(location.epochs[0])
            pieces = self._pieces(dataset, location, length)
            yield Sample(step, number, name, epoch, token, is_skipped, pieces)

    def _pieces(self, dataset: TokenDataset, location: SampleLocations, length: int) -> list[Piece]:
        stream, start = dataset.stream, int(location.starts[0])
        ids = dataset.read(location, length=length).ids[0].tolist()
        (inner,) = stream.document_starts(location.starts, length + 1)
        bounds = [start, *np.unique(inner).tolist(), start + length + 1]
        return [
            self._piece(stream, Span(begin, end), ids[begin - start : end - start])
            for begin, end in itertools.pairwise(bounds)
        ]

    def _piece(self, stream: TokenStream, span: Span, ids: list[int]) -> Piece:
        document = stream.document_at(span.begin).begin
        text = None
        if self._tokenizer is not None:
            text = self._tokenizer.decode(ids, skip_special_tokens=False)
        return Piece(
            stream.origin_at(span.begin), span.begin - document, span.end - document, ids, text
        )


def _with_paths(config: DataConfig, moved: Mapping[str, str], tokenizer: str | None) -> DataConfig:
    sources = tuple(
        source.model_copy(update={"path": moved.get(source.name, source.path)})
        for source in config.train
    )
    update = {"train": sources, "tokenizer": tokenizer or config.tokenizer}
    return config.model_copy(update=update)


def _check_given(tokenizer: str, config: DataConfig) -> None:
    """Check the tokenizer of the command line, before messages blame the run's own."""
    if config.kind == "bytes":
        raise DataError(
            f"--tokenizer {tokenizer} has no effect on a run that reads bytes; remove it"
        )
    try:
        fingerprint = tokenizer_fingerprint(tokenizer)
    except DataError as error:
        raise DataError(f"--tokenizer {tokenizer}: {error}") from error
    for source in config.train:
        info = read_info(local_prefix(source.path, cache_dir=config.cache_dir))
        if info is not None and info.tokenizer_fingerprint != fingerprint:
            raise DataError(
                f"--tokenizer {tokenizer} ({fingerprint[:12]}) is not the tokenizer of data source "
                f"{source.name} ({info.tokenizer_fingerprint[:12]}); pass {info.tokenizer}"
            )


def _open(record: OrderRecord, config: DataConfig, run_dir: Path) -> dict[str, TokenDataset]:
    try:
        streams = open_sources(config, config.train, vocab_size=record.vocab_size)
    except NoSuchFileError as error:
        raise DataError(
            f"{run_dir}: {error}; if the corpus has moved, pass --source NAME=PATH with the name "
            f"of its source ({', '.join(source.name for source in config.train)})"
        ) from error
    for name, stream in streams:
        expected = record.fingerprints[name]
        if stream.fingerprint != expected:
            raise DataError(
                f"data source {name} is not the corpus that the steps after {record.after_step} of "
                f"{run_dir} were trained on (fingerprint {stream.fingerprint[:12]}, "
                f"{expected[:12]} recorded); restore it, or pass --source {name}=PATH"
            )
    datasets = build_datasets(
        config,
        streams,
        sequence_length=config.sequence_length,
        seed=record.seed,
        vocab_size=record.vocab_size,
    )
    return {dataset.name: dataset for dataset in datasets}


def _tokenizer_of(config: DataConfig) -> Tokenizer | None:
    """The tokenizer that decodes the samples; None if it is not available."""
    if config.kind == "bytes":
        return load_tokenizer("bytes")
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    for source in config.train:
        info = read_info(local_prefix(source.path, cache_dir=config.cache_dir))
        tokenizer = None if info is None else recorded_tokenizer(info)
        if tokenizer is not None:
            return tokenizer
    return None
