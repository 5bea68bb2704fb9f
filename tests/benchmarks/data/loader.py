"""Loader against megatron.core's GPTDataset and BlendedDataset, and the cost of starting.

Both sides read the same .bin/.idx (20M tokens, documents of 1000 on average) in shuffled order and
yield batches of 16,384 tokens or one sample, from one source or from four in equal parts, in the
caller and with background workers: threads here, processes of torch's DataLoader there, as
Megatron-LM has them. Rows "not batched" leave the DataLoader out: single samples against our
batches. Then both open 64 sparse corpora of 2 billion tokens together.
"""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from data_tools.config import DataConfig
from data_tools.loading.builders import build_train_loader
from data_tools.loading.loader import TrainLoader
from tests.benchmarks.data import gpt_dataset
from tests.benchmarks.timing import Table

SEQ_LENGTHS, BATCH_TOKENS, VOCAB_SIZE = (2048, 32_768), 16_384, 50_000
NUM_TOKENS, NUM_SOURCES = 20_000_000, 4
SPARSE_FILES, SPARSE_DOCUMENTS, SPARSE_LENGTH = 64, 31_250, 1000
ROUNDS, ROUND_SECONDS = 5, 0.5


class _Start(NamedTuple):
    seconds: float
    megabytes: float


def tables() -> Iterator[Table]:
    """Samples/s, then seconds and memory until the first batch."""
    torch.set_num_threads(1)
    logging.getLogger("data_tools").setLevel(logging.ERROR)  # sparse corpora have no sidecar
    with tempfile.TemporaryDirectory() as folder:
        # Memory is measured before anything large has been allocated and freed.
        gpt_dataset.import_megatron()
        start = _start(Path(folder))
        prefixes = [Path(folder, f"corpus{i}") for i in range(NUM_SOURCES)]
        for prefix in prefixes:
            gpt_dataset.write_corpus(
                prefix, num_tokens=NUM_TOKENS // NUM_SOURCES, vocab_size=VOCAB_SIZE
            )
        yield Table(
            f"Samples/s, medians of {ROUNDS} rounds in turn",
            ("", "manyformer", "megatron.core", "ratio"),
            [
                row
                for seq_length in SEQ_LENGTHS
                for sources in (prefixes[:1], prefixes)
                for row in _speed(sources, seq_length)
            ],
        )
        yield start


def _speed(prefixes: Sequence[Path], seq_length: int) -> Iterator[tuple[str, ...]]:
    batch_size = max(1, BATCH_TOKENS // seq_length)
    theirs = _theirs(prefixes, seq_length)
    for where, workers, their_iterator in (
        ("theirs not batched", 0, gpt_dataset.samples(theirs, batch_size=batch_size)),
        ("in the caller", 0, _their_batches(theirs, batch_size, 0)),
        ("1 worker", 1, _their_batches(theirs, batch_size, 1)),
        ("2 workers", 2, _their_batches(theirs, batch_size, 2)),
    ):
        with _ours(prefixes, seq_length, batch_size, workers) as our_iterator:
            ours_rate, their_rate = _samples_per_second(our_iterator, their_iterator, batch_size)
        label = f"{seq_length:,} tokens, {len(prefixes)} source{'s'[: len(prefixes) - 1]}, {where}"
        ratio = f"{ours_rate / their_rate:.1f}x"
        yield label, f"{ours_rate:,.0f}", f"{their_rate:,.0f}", ratio


def _start(folder: Path) -> Table:
    prefixes = [folder / f"sparse{i:02}" for i in range(SPARSE_FILES)]
    for prefix in prefixes:
        gpt_dataset.write_sparse_corpus(
            prefix, num_documents=SPARSE_DOCUMENTS, length=SPARSE_LENGTH
        )
    seq_length = SEQ_LENGTHS[0]
    ours = _measure_start(lambda: next(_ours(prefixes, seq_length, 8, 0)))
    theirs = _measure_start(lambda: next(_their_batches(_theirs(prefixes, seq_length), 8, 0)))
    billions = SPARSE_FILES * SPARSE_DOCUMENTS * SPARSE_LENGTH / 1e9
    return Table(
        f"Opening {SPARSE_FILES} sparse corpora of {billions:.0f} billion tokens together, until "
        "the first batch",
        ("", "manyformer", "BlendedDataset"),
        [
            ("seconds", f"{ours.seconds:.2f}", f"{theirs.seconds:.2f}"),
            ("more memory, MB", f"{ours.megabytes:.0f}", f"{theirs.megabytes:.0f}"),
        ],
    )


def _samples_per_second(
    ours: Iterator[object], theirs: Iterator[object], batch_size: int
) -> tuple[float, float]:
    """Medians of alternating rounds of a fixed time, ours and theirs."""
    iterators = (ours, theirs)
    rates: tuple[list[float], list[float]] = ([], [])
    for iterator in iterators:
        next(iterator)
    for _ in range(ROUNDS):
        for iterator, results in zip(iterators, rates, strict=True):
            begin, count = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - begin) < ROUND_SECONDS:
                next(iterator)
                count += batch_size
            results.append(count / elapsed)
    return median(rates[0]), median(rates[1])


def _ours(
    prefixes: Sequence[Path], seq_length: int, batch_size: int, num_workers: int
) -> TrainLoader:
    section = {
        "train": [str(prefix) for prefix in prefixes],
        "sequence_length": seq_length,
        "num_workers": num_workers,
    }
    return build_train_loader(
        DataConfig.model_validate(section),
        sequence_length=seq_length,
        micro_batch_size=batch_size,
        micro_batches_per_step=1,
        data_rank=0,
        data_size=1,
        seed=0,
        vocab_size=VOCAB_SIZE,
    )


def _theirs(prefixes: Sequence[Path], seq_length: int) -> Any:
    options = {"seq_length": seq_length, "vocab_size": VOCAB_SIZE}
    if len(prefixes) == 1:
        return gpt_dataset.gpt_dataset(prefixes[0], **options)
    return gpt_dataset.blended_dataset(prefixes, **options)


def _their_batches(
    dataset: object, batch_size: int, num_workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    return gpt_dataset.batches(dataset, batch_size=batch_size, num_workers=num_workers)


def _measure_start(start: Callable[[], object]) -> _Start:
    before, begin = _resident_megabytes(), time.perf_counter()
    kept = start()
    seconds = time.perf_counter() - begin
    megabytes = _resident_megabytes() - before
    del kept
    return _Start(seconds, megabytes)


def _resident_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmRSS:\s*(\d+) kB", status)
    return int(found[1]) / 1024 if found else float("nan")
