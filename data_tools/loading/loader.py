"""The training loader: micro-batches of one data-parallel rank in an order that nothing changes.

Letters: b micro-batch size, s sequence length, D data-parallel ranks.
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
from data_tools.corpus.token_stream import NamedStream
from data_tools.errors import DataError
from data_tools.loading.batch import Batch, check_ids, has_pinned_memory, to_batch
from data_tools.loading.loader_state import GivenState, LoaderState, MixState, SourceState
from data_tools.sampling.curriculum import Curriculum
from data_tools.sampling.mix import Leg, Mix, plan_mix
from data_tools.sampling.token_dataset import Places, TokenDataset, Windows

_PLANNED = 64  # micro-batches whose samples are looked up at once


class _Plan(NamedTuple):
    """What 64 micro-batches read."""

    block: int  # the plan is for micro-batches [64 * block, 64 * (block + 1))
    legs: list[Leg]  # of each micro-batch
    sources: IntArray  # index into the names of the leg's blend, [64, b]
    places: Places  # where in that source, [64, b]


class TrainLoader:
    """Endless iterator over the micro-batches of one data-parallel rank.

    Micro-batch n of rank r holds the run-wide samples (n*D + r)*b + [0, b) after the first sample,
    so a step of G samples, a multiple of b*D, holds the same G samples in the same order at any b
    and D. `curriculum` says how many each step takes, and from which mix and of which length.
    `num_workers` threads prepare the next `num_workers + 1` micro-batches; with 0 each is prepared
    when it is asked for. An error in a thread is raised by `next`.
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
            raise ValueError(f"data_rank {data_rank} must be in [0, data_size {data_size})")
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
        self._move_to(first, plan_mix(curriculum.phases(), consumed_samples=first))

    @property
    def curriculum(self) -> Curriculum:
        """The steps of the run, from where the loader was last moved to on."""
        return self._curriculum

    @property
    def consumed_samples(self) -> int:
        """Samples of all ranks in the steps whose micro-batches have all been handed out."""
        drawn = self._num_drawn * self._micro_batch_size * self._data_size
        return self._curriculum.whole_steps(self._first_sample, self._first_sample + drawn)

    @property
    def tokens_per_source(self) -> dict[str, int]:
        """The ledger: tokens that each source has given to the run."""
        ledger = self._mix.ledger(self.consumed_samples)
        return {name: given.tokens for name, given in ledger.items()}

    @property
    def sources(self) -> list[NamedStream]:
        """The sources of the run."""
        return [NamedStream(name, dataset.stream) for name, dataset in self._datasets.items()]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Name of each source of the run -> fingerprint of its text."""
        return {name: self._fingerprints[name] for name in self._datasets}

    def skip_to(self, consumed_samples: int) -> None:
        """Go on after the first `consumed_samples` samples of the run.

        Raises:
            DataError: that is before the current mix began.
        """
        begin = self._mix.first_samples[0]
        if consumed_samples < begin:
            raise DataError(
                f"sample {consumed_samples} is before {begin}, where the current mix of sources "
                "began; resume from an earlier checkpoint"
            )
        self._move_to(consumed_samples, self._mix)

    def epochs_at(self, consumed_samples: int) -> dict[str, float]:
        """How often each source of the run will have been read after so many samples."""
        ledger = self._mix.ledger(consumed_samples)
        return {
            name: dataset.epochs(ledger[name].position)
            for name, dataset in self._datasets.items()
            if name in ledger
        }

    def describe(self, samples: Iterable[int]) -> list[str]:
        """Where samples of the run lie, such as "code token 81920 epoch 0"."""
        texts = []
        for sample in samples:
            leg = self._mix.leg_of(sample)
            (source,), places = self._look_up(leg, np.array([sample]))
            name, start, epoch = leg.blend.names[source], places.starts[0], places.epochs[0]
            texts.append(f"{name} token {start} epoch {epoch}")
        return texts

    def state_dict(self) -> dict[str, Any]:
        """Position and ledger at the last whole step, as plain JSON; the same on all ranks.

        Micro-batches of an unfinished step count as not drawn: no optimizer step has used them.
        Ask a rank that draws: under pipelines the stages between the first and the last do not.
        """
        consumed = self.consumed_samples
        leg = self._mix.leg_before(consumed)
        return LoaderState(
            consumed_samples=consumed,
            seed=self._seed,
            sequence_length=self._sequence_length,
            sources={
                name: SourceState(**given._asdict(), fingerprint=self._fingerprints[name])
                for name, given in leg.ledger(consumed).items()
            },
            mix=MixState(
                weights=leg.blend.weights,
                sequence_length=leg.sequence_length,
                start_sample=leg.blend.start_sample,
                base=leg.blend.base,
                given={name: GivenState(**each._asdict()) for name, each in leg.given.items()},
            ),
        ).model_dump()

    def load_state_dict(
        self, state: Mapping[str, Any], *, curriculum: Curriculum | None = None
    ) -> None:
        """Go on where `state` was taken, also with another batch size, data size or mix.

        `curriculum`: the run's from there on, where it is not the one that the loader has.

        Raises:
            DataError: the seed, the sequence length or the content of a source differs, or a stage
                would begin inside a step.
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
        self._move_to(saved.consumed_samples, saved.plan(self._curriculum.phases()))

    def close(self) -> None:
        """End the threads and drop what they prepared; a later `next` starts them again."""
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

    def _move_to(self, first_sample: int, mix: Mix) -> None:
        self.close()
        self._mix = mix
        self._first_sample = first_sample
        self._num_drawn = 0  # micro-batches handed out since `_first_sample`
        self._plan: _Plan | None = None
        self._check_steps()

    def _check_steps(self) -> None:
        per_round = self._micro_batch_size * self._data_size
        for stage in self._curriculum.stages:
            if stage.sequences_per_step % per_round:
                raise DataError(
                    f"steps of {stage.sequences_per_step} samples are not whole micro-batches of "
                    f"{self._micro_batch_size} samples on each of {self._data_size} data ranks; "
                    "change training.batch_size"
                )
        self._curriculum.check_begin(self._first_sample)

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
            self.close()  # what was prepared after the failed one must not be handed out
            raise

    def _prepare(self, number: int) -> Batch:
        plan = self._plan
        if plan is None or number // _PLANNED != plan.block:
            # Two threads may plan the same block; both get the same plan.
            plan = self._plan = self._make_plan(number // _PLANNED)
        row = number % _PLANNED
        leg, sources = plan.legs[row], plan.sources[row]
        rows: list[tuple[IntArray, Windows]] = []
        for source in sorted(set(sources.tolist())):
            own = np.flatnonzero(sources == source)
            name = leg.blend.names[source]
            places = Places(*(each[row][own] for each in plan.places))
            try:
                windows = self._datasets[name].read(places, length=leg.sequence_length)
            except OSError as error:
                raise DataError(
                    f"data source {name}: micro-batch {number} of data rank {self._data_rank}, "
                    f"tokens from {places.starts.tolist()}, cannot be read: {error}"
                ) from error
            check_ids(windows.ids, vocab_size=self._vocab_size, name=name)
            rows.append((own, windows))
        return to_batch(_merge(rows), pin=self._pin)

    def _make_plan(self, block: int) -> _Plan:
        """Look up the samples of 64 micro-batches; one by one it takes as long as reading them."""
        numbers = np.arange(block * _PLANNED, (block + 1) * _PLANNED)
        firsts = (numbers * self._data_size + self._data_rank) * self._micro_batch_size
        samples = self._first_sample + firsts[:, None] + np.arange(self._micro_batch_size)
        legs = [self._mix.leg_of(first) for first in samples[:, 0].tolist()]
        sources = np.empty_like(samples)
        places = Places(np.empty_like(samples), np.empty_like(samples))
        for leg in self._mix.legs:
            rows = np.flatnonzero([each is leg for each in legs])
            if len(rows):
                sources[rows], found = self._look_up(leg, samples[rows])
                places.starts[rows], places.epochs[rows] = found
        return _Plan(block, legs, sources, places)

    def _look_up(self, leg: Leg, samples: IntArray) -> tuple[IntArray, Places]:
        sources, samples_of_source = leg.blend.draw(samples)
        places = Places(np.empty_like(samples), np.empty_like(samples))
        for source, name in enumerate(leg.blend.names):
            mask = sources == source
            positions = samples_of_source[mask] * leg.sequence_length
            places.starts[mask], places.epochs[mask] = self._datasets[name].places(positions)
        return sources, places


def _merge(parts: list[tuple[IntArray, Windows]]) -> Windows:
    """Put the rows of each source in their places."""
    if len(parts) == 1:
        return parts[0][1]
    order = np.argsort(np.concatenate([places for places, _ in parts]))
    ids = np.concatenate([windows.ids for _, windows in parts])[order]
    segments = [windows.segment_ids for _, windows in parts if windows.segment_ids is not None]
    return Windows(ids, np.concatenate(segments)[order] if segments else None)


def _current_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def _use_device(device: int | None) -> None:
    # A new thread's device is 0: pinning there would open a context of every rank on GPU 0.
    if device is not None:
        torch.cuda.set_device(device)
