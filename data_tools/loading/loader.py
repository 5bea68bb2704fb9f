"""Training loader: micro-batches of one data-parallel rank in a layout-independent order.

Notation: b micro-batch size, s sequence length, D data-parallel ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from data_tools.arrays import IntArray
from data_tools.config import DataConfig
from data_tools.corpus.token_stream import NamedStream
from data_tools.errors import DataError
from data_tools.loading.batch import Batch, check_ids, has_pinned_memory, to_batch
from data_tools.loading.loader_state import LoaderState, MixState, SourceProgressState, SourceState
from data_tools.sampling.curriculum import Curriculum
from data_tools.sampling.mix import Mix, MixSegment, plan_mix
from data_tools.sampling.order_record import OrderRecord, order_record
from data_tools.sampling.token_dataset import SampleLocations, TokenDataset, Windows

_BLOCK_SIZE = 64  # micro-batches whose samples are located at once


class _Block(NamedTuple):
    """Sample locations of micro-batches [64 * number, 64 * (number + 1))."""

    number: int
    segments: list[MixSegment]  # of each micro-batch
    sources: IntArray  # index into the names of the segment's blend, [64, b]
    locations: SampleLocations  # within that source, [64, b]


class TrainLoader:
    """Endless iterator over the micro-batches of one data-parallel rank.

    Micro-batch n of rank r holds the run-wide samples (n*D + r)*b + [0, b) after the first sample,
    so that a step of G samples, a multiple of b*D, holds the same G samples in the same order at
    any b and D. `curriculum` gives the number of samples, mix and sequence length of each step.
    `num_workers` threads prefetch the next `num_workers + 1` micro-batches; with 0 each is prepared
    on demand. An error in a thread is raised by `next`.
    """

    def __init__(
        self,
        datasets: Sequence[TokenDataset],
        curriculum: Curriculum,
        *,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        seed: int,
        vocab_size: int,
        num_workers: int,
    ) -> None:
        if not 0 <= data_rank < data_size:
            raise ValueError(
                f"data_rank={data_rank} must be in [0, data_size={data_size}); "
                "pass the rank of this process among the data ranks"
            )
        self._datasets = {dataset.name: dataset for dataset in datasets}
        self._curriculum = curriculum
        self._micro_batch_size = micro_batch_size
        self._data_rank = data_rank
        self._data_size = data_size
        self._seed = seed
        self._vocab_size = vocab_size
        self._num_workers = num_workers
        self._pin = has_pinned_memory()
        self._fingerprints = {dataset.name: dataset.stream.fingerprint for dataset in datasets}
        self._sequence_length = datasets[0].sequence_length
        self._pending: deque[Future[Batch]] = deque()
        self._executor: ThreadPoolExecutor | None = None
        first = curriculum.start.samples
        self._seek(first, plan_mix(curriculum.mix_schedule(), consumed_samples=first))

    @property
    def curriculum(self) -> Curriculum:
        """Curriculum of the run, from the last position that the loader was moved to."""
        return self._curriculum

    @property
    def consumed_samples(self) -> int:
        """Samples of all ranks in the steps whose micro-batches have all been returned."""
        drawn = self._num_drawn * self._micro_batch_size * self._data_size
        samples = self._first_sample + drawn
        return self._curriculum.samples_in_whole_steps(self._first_sample, samples)

    @property
    def sources(self) -> list[NamedStream]:
        """The sources of the run."""
        return [NamedStream(name, dataset.stream) for name, dataset in self._datasets.items()]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Map the name of each source of the run to the fingerprint of its text."""
        return {name: self._fingerprints[name] for name in self._datasets}

    def skip_to(self, consumed_samples: int) -> None:
        """Continue after the first `consumed_samples` samples of the run.

        Raises:
            DataError: the position is before the start of the current mix.
        """
        begin = self._mix.first_samples[0]
        if consumed_samples < begin:
            raise DataError(
                f"sample {consumed_samples} is before {begin}, where the current mix of sources "
                "began; resume from an earlier checkpoint"
            )
        self._seek(consumed_samples, self._mix)

    def epochs_at(self, consumed_samples: int) -> dict[str, float]:
        """Return the number of passes over each source after `consumed_samples` samples."""
        ledger = self._mix.ledger(consumed_samples)
        return {
            name: dataset.epochs(ledger[name].position)
            for name, dataset in self._datasets.items()
            if name in ledger
        }

    def describe(self, samples: Iterable[int]) -> list[str]:
        """Describe the locations of samples of the run, such as "code token 81920 epoch 0"."""
        texts = []
        for sample in samples:
            segment = self._mix.segment_of(sample)
            (source,), locations = self._locate(segment, np.array([sample]))
            start, epoch = locations.starts[0], locations.epochs[0]
            texts.append(f"{segment.blend.names[source]} token {start} epoch {epoch}")
        return texts

    def order_record(
        self,
        config: DataConfig,
        *,
        seen_step: int,
        skipped_steps: Sequence[tuple[int, int]] = (),
    ) -> OrderRecord:
        """Record which samples the steps take from the start of the curriculum on.

        `config`: the settings that the loader was built from; `seen_step`, `skipped_steps`: see
        `OrderRecord`.
        """
        return order_record(
            config,
            self._curriculum,
            self._mix,
            fingerprints=self.fingerprints,
            seed=self._seed,
            vocab_size=self._vocab_size,
            seen_step=seen_step,
            skipped_steps=skipped_steps,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return position and ledger at the last whole step as plain JSON, equal on all ranks.

        Micro-batches of an unfinished step count as unread: no optimizer step has used them.
        Call it on a rank that iterates: in a pipeline only the first and last stages do.
        """
        consumed = self.consumed_samples
        segment = self._mix.segment_before(consumed)
        return LoaderState(
            consumed_samples=consumed,
            seed=self._seed,
            sequence_length=self._sequence_length,
            sources={
                name: SourceState(**progress._asdict(), fingerprint=self._fingerprints[name])
                for name, progress in segment.ledger(consumed).items()
            },
            mix=MixState(
                weights=segment.blend.weights,
                sequence_length=segment.sequence_length,
                start_sample=segment.blend.start_sample,
                base=segment.blend.base,
                given={
                    name: SourceProgressState(**progress._asdict())
                    for name, progress in segment.ledger_before.items()
                },
            ),
        ).model_dump()

    def load_state_dict(
        self, state: Mapping[str, Any], *, curriculum: Curriculum | None = None
    ) -> None:
        """Continue from `state`; batch size, data size and mix may differ.

        Args:
            curriculum: Curriculum of the run from there on; None: keep the loader's.

        Raises:
            DataError: the seed, the sequence length or the content of a source differs, or a stage
                would start inside a step.
        """
        saved = LoaderState.parse(state)
        saved.check_resumable(
            seed=self._seed,
            sequence_length=self._sequence_length,
            fingerprints=self.fingerprints,
        )
        earlier = {name: source.fingerprint for name, source in saved.sources.items()}
        self._fingerprints = {**earlier, **self._fingerprints}
        self._curriculum = curriculum or self._curriculum
        self._seek(saved.consumed_samples, saved.plan_mix(self._curriculum.mix_schedule()))

    def close(self) -> None:
        """Stop the threads and drop prefetched batches; a later `next` starts them again."""
        self._pending.clear()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch = self._prefetched() if self._num_workers else self._prepare(self._num_drawn)
        self._num_drawn += 1
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _seek(self, first_sample: int, mix: Mix) -> None:
        self.close()
        self._mix = mix
        self._first_sample = first_sample
        self._num_drawn = 0  # micro-batches returned since `_first_sample`
        self._block: _Block | None = None
        self._check_steps()

    def _check_steps(self) -> None:
        samples_per_micro_step = self._micro_batch_size * self._data_size
        for stage in self._curriculum.stages:
            if stage.sequences_per_step % samples_per_micro_step:
                raise DataError(
                    f"steps of {stage.sequences_per_step} samples are not whole micro-batches of "
                    f"{self._micro_batch_size} samples on each of {self._data_size} data ranks; "
                    "change training.batch_size"
                )
        self._curriculum.check_step_alignment(self._first_sample)

    def _prefetched(self) -> Batch:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(
                self._num_workers,
                thread_name_prefix="data-loader",
                initializer=_use_device,
                initargs=(_current_device(),),
            )
        while len(self._pending) <= self._num_workers:
            number = self._num_drawn + len(self._pending)
            self._pending.append(self._executor.submit(self._prepare, number))
        try:
            return self._pending.popleft().result()
        except BaseException:
            self.close()  # batches prefetched after the failed one must not be returned
            raise

    def _prepare(self, number: int) -> Batch:
        block = self._block
        if block is None or number // _BLOCK_SIZE != block.number:
            # Two threads may compute the same block; both get the same result.
            block = self._block = self._locate_block(number // _BLOCK_SIZE)
        index = number % _BLOCK_SIZE
        segment, sources = block.segments[index], block.sources[index]
        parts: list[tuple[IntArray, Windows]] = []
        for source in sorted(set(sources.tolist())):
            rows = np.flatnonzero(sources == source)
            name = segment.blend.names[source]
            locations = SampleLocations(*(each[index][rows] for each in block.locations))
            try:
                windows = self._datasets[name].read(locations, length=segment.sequence_length)
            except OSError as error:
                raise DataError(
                    f"data source {name}: micro-batch {number} of data rank {self._data_rank}, "
                    f"tokens from {locations.starts.tolist()}, cannot be read: {error}"
                ) from error
            check_ids(windows.ids, vocab_size=self._vocab_size, name=name)
            parts.append((rows, windows))
        return to_batch(_merge_rows(parts), pin=self._pin)

    def _locate_block(self, number: int) -> _Block:
        """Locate the samples of 64 micro-batches; one by one, locating takes as long as reading."""
        numbers = np.arange(number * _BLOCK_SIZE, (number + 1) * _BLOCK_SIZE)
        firsts = (numbers * self._data_size + self._data_rank) * self._micro_batch_size
        samples = self._first_sample + firsts[:, None] + np.arange(self._micro_batch_size)
        segments = [self._mix.segment_of(first) for first in samples[:, 0].tolist()]
        sources = np.empty_like(samples)
        locations = SampleLocations(np.empty_like(samples), np.empty_like(samples))
        for segment in self._mix.segments:
            rows = np.flatnonzero([each is segment for each in segments])
            if len(rows):
                sources[rows], found = self._locate(segment, samples[rows])
                locations.starts[rows], locations.epochs[rows] = found
        return _Block(number, segments, sources, locations)

    def _locate(self, segment: MixSegment, samples: IntArray) -> tuple[IntArray, SampleLocations]:
        sources, samples_of_source = segment.blend.look_up(samples)
        locations = SampleLocations(np.empty_like(samples), np.empty_like(samples))
        for source, name in enumerate(segment.blend.names):
            mask = sources == source
            positions = samples_of_source[mask] * segment.sequence_length
            found = self._datasets[name].locate(positions)
            locations.starts[mask], locations.epochs[mask] = found
        return sources, locations


def _merge_rows(parts: list[tuple[IntArray, Windows]]) -> Windows:
    """Merge the rows of all sources in batch order."""
    if len(parts) == 1:
        return parts[0][1]
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    ids = np.concatenate([windows.ids for _, windows in parts])[order]
    segments = [windows.segment_ids for _, windows in parts if windows.segment_ids is not None]
    return Windows(ids, np.concatenate(segments)[order] if segments else None)


def _current_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def _use_device(device: int | None) -> None:
    # New threads start on device 0: pinning there would give every rank a context on GPU 0.
    if device is not None:
        torch.cuda.set_device(device)
